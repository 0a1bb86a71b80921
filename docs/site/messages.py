"""The page of all messages, with what helps where a message alone does not."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from itertools import chain
from pathlib import Path

import yaml
from raised import ROOT, Message, Sources

EXPLAINED = Path(__file__).with_name("explanations.yaml")
MARK = "<!-- messages -->"


def explanations() -> dict[str, str]:
    """Part of a message -> what helps where the message alone does not."""
    read: dict[str, str] = yaml.safe_load(EXPLAINED.read_text(encoding="utf-8"))
    return read


def explained(message: Message, known: dict[str, str]) -> list[str]:
    """The explanations that belong to a message."""
    texts = "\n".join([message.text, *chain.from_iterable(message.fills.values())])
    return [told for part, told in known.items() if part in texts]


def write_messages(page: str, messages: Sequence[Message] | None = None) -> str:
    """The page with all messages in the place of its mark, by room and file."""
    found: dict[str, dict[str, list[Message]]] = defaultdict(lambda: defaultdict(list))
    for message in Sources().messages() if messages is None else messages:
        found[message.room][message.file].append(message)
    known, lines = explanations(), []
    for room in sorted(found):
        lines.append(f"\n## Messages of {room}\n")
        for file, messages in sorted(found[room].items()):
            about = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))) or ""
            lines += [f"\n### {file}\n", about.split("\n\n")[0].replace("\n", " "), ""]
            lines += ['<dl class="messages">', *(_entry(m, known) for m in messages), "</dl>"]
    return page.replace(MARK, "\n".join(lines))


def _entry(message: Message, known: dict[str, str]) -> str:
    """A message as an item of a definition list; one line, which Markdown leaves as it is."""
    html = [f"<dt><code>{marked(message.text)}</code></dt>"]
    html += [f"<dd>{escape(told)}</dd>" for told in explained(message, known)]
    for place, texts in message.fills.items():
        items = "".join(f"<li><code>{marked(text)}</code></li>" for text in texts)
        html.append(f"<dd>{marked(place)} is one of<ul>{items}</ul></dd>")
    return "".join(html)


def marked(text: str) -> str:
    """HTML of a template: its places are set apart."""
    return re.sub("‹([^›]*)›", r"<var>\1</var>", escape(" ".join(text.split())))
