// A message of lesa that is pasted into the search box is looked for by its words.
//
// The search has a syntax of its own, in which "height=60: ..." asks for a field "height=60", and a
// word of a title counts a thousand times as much as one of the text. What a message was filled
// with (quoted values, numbers, paths) stands on no page.
const MESSAGE = /^\s*(lesa|[\w.]*Error): |^\S+=.*?: /s;
const QUERY = 2; // the kind of message that the theme sends to its search worker

function asQuery(text) {
  if (!MESSAGE.test(text)) return text;
  const sentence = text.replace(/^\s*(lesa|[\w.]*Error): /, "");
  const [problem, remedy = ""] = sentence.split(/;(.*)/s);
  const words = (part) =>
    part
      .replace(/^\S+?=('[^']*'|"[^"]*"|[^\s:]*)/, " ") // the field and its value
      .replace(/'[^']*'|"[^"]*"|\([^)]*\)/g, " ")
      .split(/[^\p{L}\p{N}_./-]+/u)
      .filter((word) => /^\p{L}+$/u.test(word) && word.length > 2)
      .map((word) => word.toLowerCase());
  const first = words(problem).map((word) => `text:${word}^3`);
  const found = [...new Set([...first, ...words(remedy).map((word) => `text:${word}`)])];
  return found.length ? found.join(" ") : sentence.replace(/[^\p{L}\p{N}]+/gu, " ");
}

const send = Worker.prototype.postMessage;
Worker.prototype.postMessage = function (message, ...more) {
  const asked = message?.type === QUERY && typeof message.data === "string";
  return send.call(this, asked ? { ...message, data: asQuery(message.data) } : message, ...more);
};
