"""The rows of a comparison as tables: for a page, and for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isinf
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from lesa.evaluation.printable import printable
from lesa.evaluation.ranking import OURS, Row, best_peer, decibels, is_borrowed, name, ours, wanted

_TITLES = {  # columns of the page's table, of which each is there if it was measured
    "full_steps": "full steps",
    "speedup": "speed-up",
    "psnr_mean": "PSNR mean",
    "psnr_p10": "p10",
    "psnr_min": "min",
    "psnr_frame_min": "worst frame",
    "temporal_psnr": "motion",
    "lpips_mean": "LPIPS mean",
    "lpips_max": "LPIPS max",
    "psnr_u8wrap": "paper's PSNR",
    "ssim_mean": "SSIM",
    "scores": "",
    "seconds": "seconds",
    "tflops": "TFLOP",
    "cache_bytes": "cache",
    "peak_bytes": "peak memory",
}
_HEADLINE = ("speedup", "psnr_mean", "psnr_p10", "psnr_min")
_FORMS = {"full_steps": "{:.4g}", "speedup": "{:.2f}x", "seconds": "{:.3g}", "tflops": "{:.3g}"}
_FORMS |= {"ssim_mean": "{:.4f}", "lpips_mean": "{:.4f}", "lpips_max": "{:.4f}"}


def page_table(rows: Sequence[Row], plain: Mapping[str, Any], num_steps: int) -> dict[str, Any]:
    """All rows by the largest of lesa's numbers of full steps that they reach, best mean first.

    columns: titles. groups: lines under a heading each, of which every line has its name, its
    full steps in words, and a cell per column with its text and its 95 % interval.
    """
    reference = {"full_steps": num_steps, "speedup": 1.0, **plain}
    columns = _columns(rows)
    plain_row: Row = {**reference, "method": "plain", "schedule": ""}
    groups = [("", [plain_row]), *_groups(rows)]
    lines = [(heading, [_line(row, columns) for row in group]) for heading, group in groups]
    return {"columns": [title for _, _, title in columns], "groups": lines}


def _columns(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Key, name of a score (or nothing) and title of every column that a row has."""
    scores = dict.fromkeys(score for row in rows for score in row.get("scores", {}))
    found: list[tuple[str, str, str]] = []
    for key, title in _TITLES.items():
        if key == "scores":
            found += [(key, score, score.replace("_", " ")) for score in scores]
        elif any(key in row for row in rows):
            found.append((key, "", title))
    return found


def _line(row: Row, columns: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    return {
        "name": printable(name(row)),
        "ours": row["method"] == OURS,
        "schedule": printable(row["schedule"]),
        "cells": [{"title": title} | _cell(row, key, score) for key, score, title in columns],
    }


def _cell(row: Row, key: str, score: str) -> dict[str, str]:
    if score and score in row.get("scores", {}):
        part = row["scores"][score]
        return _shown(part["value"], (part["low"], part["high"]), "{:.3f}")
    if score or key not in row:
        return {"text": "", "range": ""}
    if key.endswith("bytes"):
        return {"text": readable_bytes(row[key]), "range": ""}
    return _shown(row[key], row.get(f"{key}_interval", ()), _FORMS.get(key, "{:.1f}"))


def _shown(value: float | None, ends: Sequence[float | None], form: str) -> dict[str, str]:
    return {"text": _text(value, form), "range": " to ".join(_text(end, form) for end in ends)}


def _text(value: float | None, form: str) -> str:
    return "identical" if isinf(decibels(value)) else form.format(value)


def _groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    counts = [wanted(row) for row in ours(rows)]
    found: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: decibels(row["psnr_mean"]), reverse=True):
        reached = next((count for count in counts if count <= wanted(row)), wanted(row))
        found.setdefault(reached, []).append(row)
    by_count = sorted(found.items(), reverse=True)
    return [(f"{count} full steps or a little more", group) for count, group in by_count]


def best_peers(rows: Sequence[Row], row: Row) -> list[str]:
    """Labels of the best peer on its own list, and of the best on searched steps."""
    best = (best_peer(rows, wanted(row), lists) for lists in ("own", "searched"))
    return [peer["label"] for peer in best if peer]


def headlines(rows: Sequence[Row], found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of lesa's rows against the best peer on its own list, and on searched steps; `found` are
    the comparison's `duels`."""
    lines = []
    for row in ours(rows):
        pairs = {duel["b"]: duel for duel in found if duel["a"] == row["label"]}
        mine = [pairs[label] for label in best_peers(rows, row)]
        cells = [{"title": _TITLES[key]} | _cell(row, key, "") for key in _HEADLINE]
        lines.append({"count": wanted(row), "cells": cells, "duels": mine})
    return lines


def rich_table(rows: Iterable[Row], plain_seconds: float, num_steps: int) -> Table:
    """The rows for a terminal of 80 columns: full steps, seconds, speed-up, PSNR, cache.

    A star marks a method that was given the full steps that were searched for lesa.
    """
    rows = list(rows)
    marked = (
        "* on the full steps that were searched for lesa" if any(map(is_borrowed, rows)) else None
    )
    title = "PSNR against the plain run, dB"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, caption=marked)
    table.add_column("method", no_wrap=True)
    for column in ("full", "seconds", "speed-up", "mean", "p10", "min", "cache"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("plain", f"{num_steps}", f"{plain_seconds:.3g}", "1.00x", "-", "-", "-", "-")
    for row in rows:
        table.add_row(
            escape(row["method"] + "*" * is_borrowed(row)),
            f"{row['full_steps']:.4g}",
            f"{row['seconds']:.3g}",
            f"{row['speedup']:.2f}x",
            *(f"{decibels(row[f'psnr_{key}']):.1f}" for key in ("mean", "p10", "min")),
            readable_bytes(row["cache_bytes"]),
            style="bold green" if row["method"] == OURS else None,
        )
    return table


def readable_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
