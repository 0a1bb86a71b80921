"""What a report's page shows of a comparison: the first sentence, the pictures, the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, isinf
from typing import Any

from torch import Tensor

from lesa.evaluation.comparison import PLAIN, Comparison, Worst
from lesa.evaluation.pictures import data_uri, shown_frames
from lesa.evaluation.plots import GAIN
from lesa.evaluation.printable import printable
from lesa.evaluation.ranking import OURS, Row, best_peer, decibels, name, ours, wanted

COLUMNS, VIDEO_COLUMNS = 8, 2  # prompts beside one another
SLIDERS = 3
TINY = 128  # pixels of a side below which single pixels are shown
_SAME, _NEARLY = 40.0, 30.0  # dB of the 10th percentile
_ALT, _CAPTION = 120, 160  # characters of a prompt


def in_grid(rows: Sequence[Row], shown: Sequence[str] | None = None) -> list[str]:
    """Labels of the rows whose pictures are shown: at each of lesa's numbers of full steps lesa and
    the best peer on its own list; all rows of a comparison without lesa; of `shown` methods all."""
    if shown is not None:
        return [row["label"] for row in rows if row["method"] in shown]
    if not ours(rows):
        return [row["label"] for row in rows]
    pairs = ((row, best_peer(rows, wanted(row), "own")) for row in ours(rows))
    return list(dict.fromkeys(row["label"] for pair in pairs for row in pair if row))


def first_row(rows: Sequence[Row]) -> Row | None:
    """lesa's row with the best mean, that the first sentence is about."""
    return max(ours(rows), key=lambda row: decibels(row["psnr_mean"]), default=None)


def sentence(comparison: Comparison) -> dict[str, str]:
    """The first sentence of a page in two halves: `gain`, and the `numbers` behind it.

    Pictures are called the same from 40 dB in the 10th percentile on, nearly the same from 30 dB.
    """
    row, steps = first_row(comparison.rows), comparison.settings["num_inference_steps"]
    if row is None:
        best = max(comparison.rows, key=lambda row: decibels(row["psnr_mean"]))
        gain = f"{printable(name(best))} is closest to the plain run"
        return {"gain": gain, "numbers": f"{_numbers(best, steps)}, and is {_faster(best)}"}
    kind = "videos" if comparison.pictures[PLAIN].ndim == 5 else "pictures"
    levels = ((_SAME, "The same"), (_NEARLY, "Nearly the same"), (-inf, "Similar"))
    fitting = (words for least, words in levels if decibels(row["psnr_p10"]) >= least)
    alike = next(fitting, "Unusable")  # of pictures that hold no numbers
    peer = best_peer(comparison.rows, wanted(row), "own")
    beside = "" if peer is None else f", where the best peer, {_mean(peer)}"
    gain = f"{alike} {kind}, {_faster(row)}"
    return {"gain": gain, "numbers": _numbers(row, steps) + beside}


def _numbers(row: Row, steps: int) -> str:
    mean, tail, least = (_decibels(row[f"psnr_{key}"]) for key in ("mean", "p10", "min"))
    return (
        f"{printable(name(row))} with {row['full_steps']:.4g} of {steps} steps in full has a PSNR"
        f" of {mean} in the mean, {tail} in the 10th percentile (p10) and {least} at least"
    )


def _mean(row: Row) -> str:
    found = _decibels(row["psnr_mean"])
    return f"{printable(name(row))} with {row['full_steps']:.4g}, has {found} in the mean"


def _faster(row: Row) -> str:
    return f"{row['speedup']:.1f} times faster" if row["speedup"] >= 1.05 else "no faster"


def _decibels(value: float | None) -> str:
    return "∞ dB" if isinf(decibels(value)) else f"{value:.1f} dB"


def described(row: Row) -> str:
    """A row in words: "lesa, 10 full steps"."""
    return f"{printable(name(row))}, {row['full_steps']:.4g} full steps"


def grid(comparison: Comparison, labels: Sequence[str]) -> dict[str, Any]:
    """The first pictures, plain and by the rows with these labels, each with its PSNR."""
    rows = {row["label"]: row for row in comparison.rows}
    steps = comparison.settings["num_inference_steps"]
    names = {PLAIN: f"plain, {steps} steps", **{label: described(rows[label]) for label in labels}}
    values = {label: rows[label]["psnr"] for label in labels}
    pictures = {label: comparison.pictures[label] for label in names}
    return _view(names, pictures, comparison.titles, values)


def worst_grid(worst: Worst, rows: Sequence[Row]) -> dict[str, Any]:
    """Where one of lesa's rows is worst, with the differences from the plain run enlarged."""
    plain, *others = worst.pictures
    by_label = {row["label"]: row for row in rows}
    names = {plain: plain, **{label: described(by_label[label]) for label in others}}
    pictures: dict[str, Tensor] = dict(worst.pictures)
    for label in others:
        names[f"error {label}"] = f"error of {by_label[label]['method']} x {GAIN}"
        pictures[f"error {label}"] = 0.5 + GAIN * (pictures[label] - pictures[plain])
    return _view(names, pictures, worst.prompts, worst.decibels) | {"label": worst.label}


def _view(
    names: Mapping[str, str],
    pictures: Mapping[str, Tensor],
    prompts: Sequence[str],
    values: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Lines of pictures by label, under the prompts as columns."""
    first = next(iter(pictures.values()))
    moving = first.ndim == 5
    columns = min(len(prompts), len(first), VIDEO_COLUMNS if moving else COLUMNS)
    lines = [
        {
            "label": label,
            "name": names[label],
            "ours": label.rpartition(" @")[0] == OURS,
            "cells": [
                {
                    "note": _decibels(values[label][column]) if label in values else "",
                    "frames": _frames(shown[column], f"{names[label]}: {prompts[column]}"),
                }
                for column in range(columns)
            ],
        }
        for label, shown in pictures.items()
    ]
    return {
        "moving": moving,
        "tiny": max(first.shape[-2:]) < TINY,
        "prompts": [printable(prompt, _CAPTION) for prompt in prompts[:columns]],
        "lines": lines,
    }


def _frames(picture: Tensor, alt: str) -> list[dict[str, str]]:
    found = shown_frames(picture)
    return [
        {
            "src": data_uri(frame),
            "alt": printable(f"frame {number}, {alt}" if len(found) > 1 else alt, _ALT),
        }
        for number, frame in found.items()
    ]


def sliders(comparison: Comparison, shown: Mapping[str, Any]) -> dict[str, Any] | None:
    """Which of a grid's pictures are laid over one another: the line that is chosen first (lesa's
    with the best mean, else the first), and the columns of its best, middle and worst picture; None
    where the grid holds nothing beside the plain run."""
    labels = [line["label"] for line in shown["lines"]]
    if len(labels) < 2 or not shown["prompts"]:
        return None
    row = first_row(comparison.rows)
    chosen = labels.index(row["label"]) if row and row["label"] in labels else 1
    values = next(row["psnr"] for row in comparison.rows if row["label"] == labels[chosen])
    order = sorted(range(len(shown["prompts"])), key=lambda at: decibels(values[at]), reverse=True)
    places = [order[round(part * (len(order) - 1) / (SLIDERS - 1))] for part in range(SLIDERS)]
    return {"line": chosen, "columns": list(dict.fromkeys(places))}


def strips(comparison: Comparison) -> list[dict[str, Any]]:
    """Full and skipped steps of each of lesa's rows, and of the best peer where it keeps a list."""
    rows, steps = comparison.rows, comparison.settings["num_inference_steps"]
    found: dict[str, dict[str, Any]] = {}
    for mine in ours(rows):
        for row in (mine, best_peer(rows, wanted(mine), "own")):
            if row is not None and "full_step_list" in row:
                found[row["label"]] = {
                    "name": described(row),
                    "ours": row["method"] == OURS,
                    "full": row["full_step_list"],
                    "steps": _steps(row["full_step_list"], steps, comparison.noise_levels),
                }
    return list(found.values())


def _steps(full: Sequence[int], count: int, levels: Sequence[float]) -> list[dict[str, Any]]:
    """Each step: is it full, and what a pointer over it is told."""
    kinds = {step: "in full" for step in full}
    return [
        {
            "full": step in kinds,
            "told": f"step {step}"
            + (f", noise level {levels[step]:.3f}" if levels else "")
            + f": {kinds.get(step, 'skipped, forecast')}",
        }
        for step in range(count)
    ]
