"""How lesa ranks: which rows are compared with which, and the differences between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from lesa.evaluation.intervals import bootstrap, mean, percentile_10

Row = Mapping[str, Any]
OURS = "lesa"
OTHER_TAP = "lesa-hidden"  # lesa too, where a benchmark trains a second forecaster; no opponent
OTHER_FORM = "lesa-disca"  # lesa too, with a network on skipped steps; no opponent
UNTRAINED = "lesa-untrained"  # lesa too, where nobody has trained anything; no opponent
IN_ENGINE = "lesa-cache-dit"  # lesa too, run by another engine; no opponent
_OWN = (OURS, OTHER_TAP, OTHER_FORM, UNTRAINED, IN_ENGINE)
_MORE = 1.15  # times lesa's full steps: what a peer may have and still do comparable work


def wanted(row: Row) -> int:
    """The number of full steps that a row was built for: of an adaptive method the nominal one, of
    lesa with a guard that spends some no fewer than the mean."""
    if row.get("method") == OURS:
        return ceil(row["full_steps"] - 1e-9)
    return int(row["label"].rsplit("@", 1)[1]) if "label" in row else round(row["full_steps"])


def origin(row: Row) -> str:
    """ "own" where a method follows its published schedule, "searched" where it is given lesa's."""
    return str(row["schedule"]).split(":")[0]


def is_borrowed(row: Row) -> bool:
    """Is it a peer that is given lesa's full steps?"""
    return row["method"] != OURS and origin(row) == "searched"


def name(row: Row) -> str:
    """Method and, if it is not its own, where its full steps come from."""
    return row["method"] + " (searched steps)" * is_borrowed(row)


def ours(rows: Sequence[Row], method: str = OURS) -> list[Row]:
    """lesa's rows, or those of another of its forms, most full steps first."""
    return sorted((row for row in rows if row["method"] == method), key=wanted, reverse=True)


def opponents(rows: Sequence[Row], count: int) -> list[Row]:
    """Of every other method, on its own list and on lesa's, the row with the fewest full steps that
    are not below `count`: ties favour the peer. Best mean first.

    A row with more than 15 % more full steps is none: a step of a model of four, or PAB and
    FasterCache, which run all blocks at every step and are read by TFLOP.
    """
    found: dict[str, Row] = {}
    for row in sorted(rows, key=wanted):
        comparable = wanted(row) >= count and row["full_steps"] <= _MORE * count
        if row["method"] not in _OWN and comparable:
            found.setdefault(name(row), row)
    return sorted(found.values(), key=lambda row: decibels(row["psnr_mean"]), reverse=True)


def best_peer(rows: Sequence[Row], count: int, lists: str | None = None) -> Row | None:
    """The opponent with the highest mean, among those on `own` or `searched` lists if given."""
    fitting = (row for row in opponents(rows, count) if lists in (None, origin(row)))
    return next(fitting, None)


def decibels(value: float | None) -> float:
    """A PSNR as it comes from strict JSON, where that of identical pictures is null."""
    return torch.inf if value is None else value


def difference(a: Row, b: Row) -> dict[str, Any]:
    """a minus b in dB over the same prompts, with paired 95 % intervals.

    mean: of the prompts' differences. p10: 10th percentile of a minus that of b. won: share of
    the prompts where a is the better one. Two identical pictures differ by 0 dB.
    """
    first, second = (
        torch.tensor([decibels(value) for value in row["psnr"]], dtype=torch.float64)
        for row in (a, b)
    )
    return {
        "a": a["label"],
        "b": b["label"],
        "prompts": len(first),
        "mean": bootstrap(mean, _minus(first, second)),
        "p10": bootstrap(lambda x, y: _minus(percentile_10(x), percentile_10(y)), first, second),
        "won": (first > second).double().mean().item(),
    }


def duels(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """`difference` of each of lesa's rows from all its `opponents`, smallest advantage first."""
    found = []
    for row in ours(rows):
        parts = [difference(row, other) for other in opponents(rows, wanted(row))]
        found += sorted(parts, key=lambda part: part["mean"]["value"])
    return found


def _minus(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a == b, 0.0, a - b)  # infinite minus infinite would be no number
