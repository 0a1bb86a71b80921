"""What the pages of results are made of: cells, tables and sentences from rows of JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from lesa.evaluation.ranking import (
    OURS,
    Row,
    decibels,
    difference,
    name,
    opponents,
    origin,
    ours,
    wanted,
)

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
WRITTEN = {  # as their authors write them
    "fora": "FORA",
    "taylor": "TaylorSeer",
    "hicache": "HiCache",
    "foca": "FoCa",
    "clusca": "ClusCa",
    "disca": "DisCa",
    "deepcache": "DeepCache",
    "spectrum": "Spectrum",
    "dbcache": "DBCache",
    "dpcache": "DPCache",
    "meancache": "MeanCache",
    "budcache": "BudCache",
    "sencache": "SenCache",
    "dicache": "DiCache",
    "tc-pade": "TC-Pade",
    "fbcache": "FirstBlockCache",
    "magcache": "MagCache",
    "teacache": "TeaCache",
    "speca": "SpeCa",
    "freqca": "FreqCa",
    "l2p": "L2P",
    "fewer-steps": "fewer steps",
    "lesa-paper": "the paper's LESA",
    "lesa-disca": "lesa with a network",
    "lesa-untrained": "lesa, untrained",
}
RESTS = {"dpm++": "DPM++", "unipc": "UniPC", "taylor": "Taylor", "mlp": "MLP gate"}


def with_canonical_names(text: str) -> str:
    """A text of measurements, in which TaylorSeer may have its paper's name."""
    return re.sub(r"\btaylorseer-(?=[0-2]\b)", "taylor-", text)


def read(path: Path) -> Any:
    """A file of measurements, in which methods have the names of today."""
    return json.loads(with_canonical_names(path.read_text()))


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table."""
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    yield from (f"| {' | '.join(line)} |" for line in lines)


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
    ]
    if "rows" in part or "places" in part:  # a comparison, not a timing
        sentences.append(f"unseen prompt i with seed {part.get('seed', SEED)} + i")
    if "prompts" in training:
        seconds = training.get("train_seconds", training.get("seconds"))
        sentences.append(f"trained on {training['prompts']} prompts in {seconds:.0f} s")
    return "; ".join(sentences) + "."


def best(rows: Sequence[Row], count: int, lists: str, key: str) -> Row | None:
    """The opponent that is best in one metric."""
    peers = [row for row in opponents(rows, count) if origin(row) == lists]
    return max(peers, key=lambda row: decibels(row[key]), default=None)


def against(rows: Sequence[Row], method: str = OURS) -> Iterator[list[str]]:
    """A line per number of full steps and metric: lesa, the best peer on either kind of list."""
    for row in ours(rows, method):
        videos = {key: words for key, words in OF_VIDEOS.items() if key in row}
        for key, words in {**METRICS, **videos}.items():
            cells = [f"{wanted(row)}" if key == "psnr_mean" else "", words, value(row, key)]
            for lists in LISTS:
                peer = best(rows, wanted(row), lists, key)
                cells += (
                    [f"{label(peer)}: {value(peer, key)}", gain(row, peer, key)]
                    if peer
                    else ["", ""]
                )
            yield cells


def shortfalls(rows: Sequence[Row]) -> Iterator[str]:
    """A sentence for every target that was missed."""
    for row in ours(rows):
        for (lists, key), target in TARGETS.items():
            peer = best(rows, wanted(row), lists, key)
            if peer is not None and (found := ahead(row, peer, key)) < target:
                yield (
                    f"- {wanted(row)} full steps, {METRICS[key]}, peers on {LISTS[lists]}:"
                    f" {found:+.1f} dB over {label(peer)}, {target - found:.1f} dB short."
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


def value(row: Row, key: str) -> str:
    """A PSNR with its interval, where the file has one."""
    ends = row.get(f"{key}_interval")
    return shown(row[key]) + (f" ({shown(ends[0])} to {shown(ends[1])})" if ends else "")


def gain(row: Row, peer: Row, key: str) -> str:
    """lesa minus a peer, with its paired interval where the file has every prompt's PSNR."""
    text = f"{ahead(row, peer, key):+.1f}"
    part = {"psnr_mean": "mean", "psnr_p10": "p10"}.get(key)
    if part is None or "psnr" not in row:
        return text
    ends = difference(row, peer)[part]
    return f"{text} ({ends['low']:+.1f} to {ends['high']:+.1f})"


def ahead(row: Row, peer: Row, key: str) -> float:
    """dB by which a row is better than a peer's; two identical pictures differ by 0 dB."""
    a, b = decibels(row[key]), decibels(peer[key])
    return 0.0 if a == b else a - b


def label(row: Row) -> str:
    """Method and number of full steps."""
    return f"{name(row)} @{wanted(row)}"


def title(row: Row) -> str:
    """A method as its authors write it."""
    stem = next((stem for stem in WRITTEN if row["method"].startswith(stem)), None)
    if stem is None:
        return str(row["method"])
    rest = row["method"][len(stem) :].strip("-")
    if not rest or rest.isdigit():
        return f"{WRITTEN[stem]} {rest}".strip()
    return f"{WRITTEN[stem]}, {RESTS.get(rest, rest)}"


def shown(number: float | None) -> str:
    """A PSNR to one decimal."""
    return f"{number:.1f}" if isfinite(decibels(number)) else "identical"
