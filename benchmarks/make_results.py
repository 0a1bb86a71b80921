"""Write the pages of results from the committed measurements: `python benchmarks/make_results.py`.

docs/results.md is the index, docs/results/ has a page per pipeline and one each for speed,
ablations and other places, and the table of README.md is written too. Nothing is measured here:
every number comes from a JSON file under benchmarks/results/.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from _guard_page import guard_page, worth_page  # noqa: E402
from _result_pages import MADE, ablation_page, pipeline_page, speed_page, transfer_page  # noqa: E402
from _result_tables import METRICS, ahead, best, read, shown, table, title  # noqa: E402
from _submitted_page import submitted_page  # noqa: E402
from _training_costs import training_page  # noqa: E402
from _untrained_page import untrained_page  # noqa: E402

from lesa.evaluation.ranking import (  # noqa: E402
    IN_ENGINE,
    OTHER_FORM,
    OTHER_TAP,
    OURS,
    UNTRAINED,
    Row,
    ours,
    wanted,
)
from lesa.util.files import write_atomically  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
KINDS = {
    "flux": "FLUX",
    "qwen": "Qwen-Image, two guidance calls",
    "hunyuan": "HunyuanVideo, 9 frames",
    "sdxl": "SDXL's U-Net, batched guidance",
    "lightning": "8-step student of qwen",
    "schnell": "4-step student of flux",
}
BEGIN, END = "<!-- begin of the table -->\n", "<!-- end of the table -->"
HEAD = """# Results

Measured on the embedded pipelines: small, truly trained ones of the real diffusers classes
(`testbed/`). Each row compares lesa with the best of up to %d other methods.

- **Runs.** Every method runs the same unseen prompts with the same seeds and sampler as the plain
  run, and is compared with it in PSNR on floats, picture by picture, in dB.
- **Peers.** A peer is met at its fewest full steps that are not below lesa's, so ties favour the
  peer, but with at most 15 %% more of them. The best peer is chosen anew for the mean, the 10th
  percentile (p10) and the minimum. "Their own lists" are full steps as the peers publish or choose
  them, "searched steps" the list that was searched for lesa. PAB and FasterCache still do 85 to
  90 %% of the plain run's work: they are among all rows, to be read by TFLOP.
- **With a network** is lesa's form for few-step models (`form="disca"`), which runs two blocks on
  every skipped step, as DisCa does: its "faster" is lower.
- **Ranges** are 95 %% bootstrap intervals over the prompts, of differences paired by prompt. They
  are missing where a file is older than they are.
- **Targets.** 8 dB above the best peer on its own list in the mean and 5 dB in p10, no lower a
  minimum, and 3 dB in the mean over peers on searched steps. Each page lists what fell short.
- **Faster** is the plain loop's time over lesa's on the CPU that the page names, a shared one: what
  exceeds steps over full steps is noise.

## Summary
"""


def pages(results: Path = RESULTS) -> dict[str, str]:
    """Path in the repository -> text of every page."""
    compared = {path.stem: read(path) for path in sorted((results / "compare").glob("*.json"))}
    main, loops = read(results / "main_job.json"), sorted(results.glob("loop_*.json"))
    tails = {path.stem: read(path) for path in (results / "tails").glob("*.json")}
    found = {
        name: pipeline_page(name, part, main, tails.get(name)) for name, part in compared.items()
    }
    found["speed"] = speed_page(main, {path.name: read(path) for path in loops})
    for name, write in (
        ("ablations", ablation_page),
        ("transfer", transfer_page),
        ("guard", guard_page),
        ("worth", worth_page),
    ):
        if (path := results / f"{name}.json").exists():
            found[name] = write(read(path))
    if (path := results / "untrained.json").exists():
        found["untrained"] = untrained_page(read(path), read(results / "prior.json"))
    if given := {path.name: read(path) for path in sorted((results / "submitted").glob("*.json"))}:
        found["submitted"] = submitted_page(given)
    written = {f"docs/results/{name}.md": page(lines) for name, lines in found.items()}
    written["docs/results.md"] = page(index(compared, [*found]))
    written["docs/training.md"] = training_page(compared)
    return written | {"README.md": readme(compared, [read(path) for path in loops])}


def page(lines: Iterable[str]) -> str:
    """A page of these lines; how it was made is at its end, where no summary of it begins."""
    return "\n".join(lines).rstrip() + f"\n\n{MADE}\n"


def index(compared: dict[str, dict[str, Any]], names: Sequence[str]) -> Iterator[str]:
    """What is measured and how, one table, and where the pages are."""
    yield HEAD % max(map(_others, compared.values()))
    head = ("pipeline", "full steps", "lesa: mean / p10 / minimum", "best peer, mean")
    more = ("lesa better by: mean / p10 / minimum", "over peers on searched steps", "faster")
    order = [name for name in KINDS if name in compared] + [*(compared.keys() - KINDS.keys())]
    lines = (line for name in order for line in summary(name, compared[name]))
    yield from table((*head, *more), lines)
    yield "\n## Pages\n"
    kinds = {name: f"{name} ({KINDS[name]})" for name in KINDS}
    kinds |= {"speed": "speed, on a GPU and on a CPU", "ablations": "what each part is worth"}
    kinds |= {"transfer": "one checkpoint at other step counts, sizes, guidance and samplers"}
    kinds |= {"guard": "what a guard against single bad pictures would gain"}
    kinds |= {"worth": "what training says of a list, against unseen prompts"}
    kinds |= {"submitted": "files of `lesa compare --submit`, each of one commit and machine"}
    yield from (f"- [{kinds.get(name, name)}](results/{name}.md)" for name in names)
    yield ""


def _others(part: dict[str, Any]) -> int:
    """How many methods a pipeline's file has besides lesa in its forms."""
    own = {OURS, OTHER_TAP, OTHER_FORM, UNTRAINED, IN_ENGINE}
    return len({row["method"] for row in part["rows"]} - own)


def summary(name: str, part: dict[str, Any]) -> Iterator[list[str]]:
    """A line per number of full steps."""
    rows, steps = part["rows"], part["settings"]["num_inference_steps"]
    for number, row in enumerate([*ours(rows), *ours(rows, OTHER_FORM)]):
        own = {key: best(rows, wanted(row), "own", key) for key in METRICS}
        given = best(rows, wanted(row), "searched", "psnr_mean")
        peer = own["psnr_mean"]
        yield [
            "" if number else f"[{name}](results/{name}.md), {steps} steps",
            f"{wanted(row)}{', with a network' * (row['method'] == OTHER_FORM)}",
            " / ".join(shown(row[key]) for key in METRICS),
            f"{shown(peer['psnr_mean'])} ({title(peer)})" if peer else "",
            " / ".join(f"{ahead(row, p, key):+.1f}" for key, p in own.items() if p),
            f"{ahead(row, given, 'psnr_mean'):+.1f} ({title(given)})" if given else "",
            f"{row['speedup']:.2f}x",
        ]


def readme(compared: dict[str, dict[str, Any]], loops: Sequence[dict[str, Any]]) -> str:
    """README.md with its table of FLUX, and the sentence below it, written anew."""
    text = (ROOT / "README.md").read_text()
    part = compared["flux"]
    rows, steps = part["rows"], part["settings"]["num_inference_steps"]
    head = (f"full steps of {steps}", "lesa, dB", "best other method, dB", "gain, dB")
    speeds = ("faster: embedded FLUX, CPU core", "faster: FLUX.1-dev, H200")
    lines = [*table((*head, *speeds), (_readme_line(rows, row, loops) for row in ours(rows)))]
    lines += ["", *weaker(compared)]
    made = "".join(f"{line}\n" for line in lines)
    return re.sub(f"(?s)(?<={BEGIN}).*?(?={END})", lambda _: made, text, count=1)


def weaker(compared: dict[str, dict[str, Any]]) -> Iterator[str]:
    """In one line where the best peer is better, in the mean and in the worst picture."""
    means, lowest = _behind(compared, "psnr_mean"), _behind(compared, "psnr_min")
    places = sum(len(ours(part["rows"])) for part in compared.values())
    told = [f"in the mean by {text}" for _, text in means]
    if lowest:
        told.append(
            f"in the worst single picture at {len(lowest)} of the {places} counts measured on all"
            f" pipelines, by up to {lowest[0][1]}"
        )
    yield f"**Where another method is better:** {'; '.join(told) or 'nowhere measured'}."


def _behind(compared: dict[str, dict[str, Any]], key: str) -> list[tuple[float, str]]:
    """dB and a few words for every count at which a peer is ahead, largest lead first."""
    found = []
    for name, part in compared.items():
        rows, steps = part["rows"], part["settings"]["num_inference_steps"]
        for row in ours(rows):
            peer = best(rows, wanted(row), "own", key)
            if peer is not None and (by := ahead(row, peer, key)) < 0:
                place = f"{name} with {wanted(row)} of {steps} steps in full"
                more = _with_network(rows, wanted(row), peer, key)
                found.append((by, f"{-by:.1f} dB on {place} ({title(peer)}{more})"))
    return sorted(found)


def _with_network(rows: Sequence[Row], count: int, peer: Row, key: str) -> str:
    """How far ahead of the peer lesa's form with a network is, where it ran."""
    row = next((row for row in ours(rows, OTHER_FORM) if wanted(row) == count), None)
    if row is None:
        return ""
    by = ahead(row, peer, key)
    return f'; with `form="disca"` lesa is {abs(by):.1f} dB {"ahead" if by >= 0 else "behind"}'


def _readme_line(rows: Sequence[Row], row: Row, loops: Sequence[dict[str, Any]]) -> list[str]:
    peer = best(rows, wanted(row), "own", "psnr_mean")
    if peer is None:
        raise ValueError(f"{row['label']}: no peer in the file of flux")
    return [
        f"{wanted(row)}",
        shown(row["psnr_mean"]),
        f"{shown(peer['psnr_mean'])} ({title(peer)})",
        f"{ahead(row, peer, 'psnr_mean'):+.1f}",
        f"{row['speedup']:.1f}x",
        next((f"{speed:.2f}x" for speed in _on_a_gpu(loops, wanted(row))), "not timed"),
    ]


def _on_a_gpu(loops: Sequence[dict[str, Any]], count: int) -> Iterator[float]:
    """Speed-ups of the whole FLUX.1-dev at the output tap."""
    for loop in loops:
        for model in loop["models"]:
            if model["model"] == "flux.1-dev" and model["full_size"]:
                for row in model["rows"]:
                    if (row["variant"], row["full_steps"]) == ("lesa, output tap", count):
                        yield row["speedup"]["median"]


if __name__ == "__main__":
    (ROOT / "docs" / "results").mkdir(exist_ok=True)
    for path, text in pages().items():
        write_atomically(ROOT / path, text)
