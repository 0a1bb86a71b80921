"""Write docs/results.md from the committed measurements: `python benchmarks/make_results.py`.

Reads benchmarks/results/compare/*.json (a comparison's own JSON with its environment),
main_job.json, and where they are ablations.json and transfer.json. Nothing is measured here, and
every number comes from these files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lesa.evaluation.ranking import (  # noqa: E402
    Row,
    decibels,
    difference,
    name,
    opponents,
    origin,
    ours,
    wanted,
)
from lesa.forecasters.published import with_canonical_names  # noqa: E402
from lesa.util.files import write_atomically  # noqa: E402

RESULTS, OUT = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
SEED = 1000  # of the unseen prompts, in all scripts
METRICS = {"psnr_mean": "mean", "psnr_p10": "p10", "psnr_min": "minimum"}
OF_VIDEOS = {"psnr_frame_min": "worst frame", "temporal_psnr": "change from frame to frame"}
TARGETS = {  # dB by which lesa must be better than the best peer
    ("own", "psnr_mean"): 8.0,
    ("own", "psnr_p10"): 5.0,
    ("own", "psnr_min"): 0.0,
    ("searched", "psnr_mean"): 3.0,
}
LISTS = {"own": "their own lists", "searched": "searched steps"}
HEAD = """# Results

Made by `python benchmarks/make_results.py` from the files that it names; do not edit.

Every method runs the same unseen prompts with the same seeds and sampler as the plain run, and is
compared with it in PSNR on floats, picture by picture. A peer is met at its fewest full steps that
are not below lesa's, so that ties favour the peer, but with at most 15 % more of them; the best
peer is taken anew for the mean, the 10th percentile (p10) and the minimum. PAB and FasterCache do
not come down to these numbers, they do 85 to 90 % of the plain run's work: they are among all rows,
to be read by TFLOP. "Their own lists" are full steps as the peers publish or choose them, "searched
steps" the list that was searched for lesa. Ranges are 95 % bootstrap intervals over the prompts, of
differences paired by prompt; they are missing where a file is older than they are. What is aimed
at: better by 8 dB in the mean and 5 dB in p10 than the best peer on its own list, no lower a
minimum, and 3 dB in the mean over peers on searched steps.
"""


def make(results: Path = RESULTS) -> str:
    """The whole page."""
    lines = [HEAD, *(line for title, part in sources(results) for line in section(title, part))]
    for file, told in (("ablations.json", ablations), ("transfer.json", transfer)):
        if (results / file).exists():
            lines += told(read(results / file))
    return "\n".join(lines)


def read(path: Path) -> Any:
    """A file of measurements, in which methods have the names of today."""
    return json.loads(with_canonical_names(path.read_text()))


def sources(results: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Titles and what was measured: {"rows", "environment", ...} of every comparison."""
    for path in sorted((results / "compare").glob("*.json")):
        part = read(path)
        steps = part["settings"]["num_inference_steps"]
        yield f"{path.stem}, {steps} steps (`compare/{path.name}`)", part
    main = read(results / "main_job.json")
    shared = {key: main[key] for key in ("environment", "training")}
    yield "flux, 28 steps (`main_job.json`)", {**shared, **main["28 steps"]}


def section(title: str, part: dict[str, Any]) -> Iterator[str]:
    """One comparison: where it ran, lesa against the best peers, what fell short, all rows."""
    rows = part["rows"]
    yield f"## {title}\n"
    yield provenance(part) + "\n"
    yield from table(("full steps", "", "lesa, dB", *_peer_columns()), against(rows))
    short = list(shortfalls(rows))
    yield "\nFell short:\n" if short else "\nNothing fell short of what is aimed at.\n"
    yield from short
    yield from limits(rows)
    yield from attributes(part)
    yield "\n<details><summary>All rows</summary>\n"
    head = ("method", "full steps", "mean", "p10", "minimum", "SSIM", "seconds", "TFLOP")
    yield from table((*head, "full steps are"), every(rows))
    yield "\n</details>\n"
    yield from (f"{note}\n" for note in part.get("notes", ()))


def provenance(part: dict[str, Any]) -> str:
    """Machine, versions, command, commit, seeds."""
    at, training = part["environment"], part.get("training", {})
    command = part.get("command", at["command"])
    text = (
        command
        if isinstance(command, str)
        else " ".join(["python benchmarks/" + command[0], *command[1:]])
    )
    packages = ("python", "torch", "diffusers", "transformers", "lesa")
    sentences = [
        f"{at['device']['name']}, {at['cores']} cores, {at['threads']} threads",
        f"commit {at['commit']}, {at['date'][:10]}",
        ", ".join(f"{package} {at['versions'][package]}" for package in packages),
        f"`{text}`",
        f"unseen prompt i with seed {part.get('seed', SEED)} + i",
    ]
    if "prompts" in training:
        seconds = training.get("train_seconds", training.get("seconds"))
        sentences.append(f"trained on {training['prompts']} prompts in {seconds:.0f} s")
    return "; ".join(sentences) + "."


def against(rows: Sequence[Row]) -> Iterator[list[str]]:
    """A line per number of full steps and metric: lesa, the best peer on either kind of list."""
    for row in ours(rows):
        videos = {key: words for key, words in OF_VIDEOS.items() if key in row}
        for key, words in {**METRICS, **videos}.items():
            cells = [f"{wanted(row)}" if key == "psnr_mean" else "", words, value(row, key)]
            for lists in LISTS:
                peer = best(rows, wanted(row), lists, key)
                cells += (
                    [f"{_label(peer)}: {value(peer, key)}", gain(row, peer, key)]
                    if peer
                    else ["", ""]
                )
            yield cells


def best(rows: Sequence[Row], count: int, lists: str, key: str) -> Row | None:
    """The opponent that is best in one metric."""
    peers = [row for row in opponents(rows, count) if origin(row) == lists]
    return max(peers, key=lambda row: decibels(row[key]), default=None)


def shortfalls(rows: Sequence[Row]) -> Iterator[str]:
    """A sentence for every target that was missed."""
    for row in ours(rows):
        for (lists, key), target in TARGETS.items():
            peer = best(rows, wanted(row), lists, key)
            if peer is not None and (found := _gain(row, peer, key)) < target:
                yield (
                    f"- {wanted(row)} full steps, {METRICS[key]}, peers on {LISTS[lists]}:"
                    f" {found:+.1f} dB over {_label(peer)}, {target - found:.1f} dB short."
                )


def limits(rows: Sequence[Row]) -> Iterator[str]:
    """The least-squares bound beside what lesa reaches on the same prompts, where it is known."""
    found = [
        (row["limit_psnr"], row["psnr"][: len(row["limit_psnr"])], wanted(row))
        for row in ours(rows)
        if "limit" in row
    ]
    if found:
        prompts = len(found[0][0])
        told = (f"{n} full steps {fmean(a):.1f} dB (lesa {fmean(b):.1f})" for a, b, n in found)
        yield (
            "\nThe limit of the mean, a table fitted step by step on every prompt itself, on the"
            f" first {prompts} prompts: {', '.join(told)}.\n"
        )


def ablations(report: dict[str, Any]) -> Iterator[str]:
    """A section per pipeline: every variant against the reference, in dB of the final latent."""
    for pipeline, part in report.items():
        yield f"## Ablations, {pipeline} (`ablations.json`)\n"
        yield provenance(part) + "\n"
        yield (
            f"In dB of the final latent over {part['unseen_prompts']} unseen prompts, trained on"
            f" {part['calibration_prompts']}; the difference is paired by prompt.\n"
        )
        head = ("full steps", "variant", "mean", "p10", "minimum", "difference")
        yield from table(head, (_ablation(row) for row in part["rows"]))
        yield ""


def _ablation(row: dict[str, Any]) -> list[str]:
    change = row["difference"]
    return [
        f"{row['full_steps']}",
        row["variant"],
        *(f"{row[key]:.2f}" for key in ("mean", "p10", "min")),
        f"{change['value']:+.2f} ({change['low']:+.2f} to {change['high']:+.2f})",
    ]


def transfer(report: dict[str, Any]) -> Iterator[str]:
    """One checkpoint elsewhere: lesa and the best of a few peers in each place."""
    full = ", ".join(map(str, report["trained"]["full_steps"]))
    yield "## One checkpoint in other places (`transfer.json`)\n"
    yield provenance(report) + "\n"
    yield (
        f"Trained on {report['trained']['prompts']} prompts at 50 steps with {full} in full;"
        f" {report['unseen_prompts']} unseen prompts in each place.\n"
    )
    yield from table(
        ("place", "lesa, mean", "p10", "best peer", "lesa better by"),
        map(_place, report["places"]),
    )
    yield ""


def _place(place: dict[str, Any]) -> list[str]:
    *peers, lesa = place["rows"]
    peer, by = max(peers, key=lambda row: decibels(row["psnr_mean"])), place["gain"]
    return [
        place["place"],
        _decibels(lesa["psnr_mean"]),
        _decibels(lesa["psnr_p10"]),
        f"{_label(peer)}: {_decibels(peer['psnr_mean'])}",
        f"{by['value']:+.1f} ({by['low']:+.1f} to {by['high']:+.1f})",
    ]


def attributes(part: dict[str, Any]) -> Iterator[str]:
    """What the checker found in the plain run's and lesa's pictures."""
    found = part.get("attributes")
    if found:
        columns = list(next(iter(found.values())))
        yield "\nShare of what the captions say that the pictures show:\n"
        yield from table(
            ("run", *columns),
            ([label, *(f"{shares[c]:.3f}" for c in columns)] for label, shares in found.items()),
        )


def every(rows: Sequence[Row]) -> Iterator[list[str]]:
    """All rows, most full steps first, best mean first."""
    order = sorted(rows, key=lambda row: (-wanted(row), -decibels(row["psnr_mean"])))
    for row in order:
        yield [
            name(row),
            f"{row['full_steps']:.4g}",
            *(value(row, key) for key in METRICS),
            f"{row['ssim_mean']:.4f}",
            f"{row['seconds']:.3g}",
            f"{row['tflops']:.3g}",
            row["schedule"],
        ]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table."""
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    yield from (f"| {' | '.join(line)} |" for line in lines)


def value(row: Row, key: str) -> str:
    """A PSNR with its interval, where the file has one."""
    ends = row.get(f"{key}_interval")
    return _decibels(row[key]) + (
        f" ({_decibels(ends[0])} to {_decibels(ends[1])})" if ends else ""
    )


def gain(row: Row, peer: Row, key: str) -> str:
    """lesa minus a peer, with its paired interval where the file has every prompt's PSNR."""
    text = f"{_gain(row, peer, key):+.1f}"
    part = {"psnr_mean": "mean", "psnr_p10": "p10"}.get(key)
    if part is None or "psnr" not in row:
        return text
    ends = difference(row, peer)[part]
    return f"{text} ({ends['low']:+.1f} to {ends['high']:+.1f})"


def _gain(row: Row, peer: Row, key: str) -> float:
    a, b = decibels(row[key]), decibels(peer[key])
    return 0.0 if a == b else a - b


def _label(row: Row) -> str:
    return f"{name(row)} @{wanted(row)}"


def _decibels(number: float | None) -> str:
    return f"{number:.1f}" if isfinite(decibels(number)) else "identical"


def _peer_columns() -> list[str]:
    return [text for lists in LISTS.values() for text in (f"best peer, {lists}", "lesa better by")]


if __name__ == "__main__":
    write_atomically(OUT, make())
