"""A comparison as files: figures, report.html and report.json; and as a table for a terminal."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lesa.errors import LesaError
from lesa.evaluation.charts import X_LABELS, duels_png, errors_png, quality_png
from lesa.evaluation.compare import PLAIN, Comparison, Worst
from lesa.evaluation.plots import GAIN, grid_png, sheet_png
from lesa.evaluation.ranking import (
    Row,
    best_peer,
    decibels,
    duels,
    is_borrowed,
    name,
    ours,
    wanted,
)
from lesa.util.files import require_writable, to_json, write_atomically
from lesa.util.versions import versions

GRID_COLUMNS, GRID_ROWS = 8, 16


def write_report(
    comparison: Comparison,
    folder: str | Path,
    *,
    title: str = "lesa: accelerated against plain",
    shown: Sequence[str] | None = None,
    extra: dict[str, Any] | None = None,
) -> dict[str, Path]:
    """Write report.html (self-contained), report.json and every figure as PNG: quality against
    full steps, seconds and TFLOP, error per step, a grid of pictures, and of lesa's rows the paired
    differences and the worst prompts.

    `shown` names the methods in the grid, the plain run comes first; by default all of them, or of
    more than a screenful lesa and the best peers at each number of full steps. `extra` goes into
    report.json. Rows may carry `limit`, a bound of the mean in dB: it is drawn as a line of its
    own. Returns the files by name.

    Raises: LesaError if the folder cannot be written or an extra is not installed.
    """
    folder = require_writable(folder)
    found = duels(comparison.rows)
    figures = _figures(comparison, found, shown)
    facts = {**comparison.to_dict(), "paired": found, "versions": versions(), **(extra or {})}
    contents: dict[str, bytes | str] = {
        **figures,
        "report.html": _html(comparison, facts, title, figures),
        "report.json": to_json(facts),
    }
    return {file: write_atomically(folder / file, data) for file, data in contents.items()}


def _figures(
    comparison: Comparison, found: Sequence[dict[str, Any]], shown: Sequence[str] | None
) -> dict[str, bytes]:
    rows = comparison.rows
    grid = {label: comparison.pictures[label] for label in (PLAIN, *_in_grid(rows, shown))}
    figures = {
        f"quality-{x.replace('_', '-')}.png": quality_png(rows, x, _limit(rows, x))
        for x in X_LABELS
    }
    figures["error-per-step.png"] = errors_png(comparison.curves, rows)
    if found:
        figures["paired.png"] = duels_png(found, rows)
    for part in comparison.worst:
        figures[_worst_file(part)] = sheet_png(part.pictures, part.prompts, part.decibels)
    figures["grid.png"] = grid_png(grid, comparison.titles[:GRID_COLUMNS])
    return figures


def _in_grid(rows: Sequence[Row], shown: Sequence[str] | None) -> list[str]:
    if shown is not None:
        return [row["label"] for row in rows if row["method"] in shown]
    if len(rows) <= GRID_ROWS or not ours(rows):
        return [row["label"] for row in rows]
    found: list[str] = []
    for row in ours(rows):
        found += [row["label"], *_best_peers(rows, row)]
    return list(dict.fromkeys(found))


def _best_peers(rows: Sequence[Row], row: Row) -> list[str]:
    """Labels of the best peer on its own list, and of the best on searched steps."""
    best = (best_peer(rows, wanted(row), lists) for lists in ("own", "searched"))
    return [peer["label"] for peer in best if peer]


def _worst_file(part: Worst) -> str:
    return f"worst-{part.label.rsplit('@', 1)[1]}.png"


def _limit(rows: Sequence[Row], x: str) -> dict[str, list[tuple[float, float]]]:
    points = sorted((row[x], row["limit"]) for row in rows if "limit" in row)
    return {"least-squares bound": points} if points else {}


def _html(
    comparison: Comparison, facts: dict[str, Any], title: str, figures: dict[str, bytes]
) -> str:
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise LesaError(
            f"report: jinja2 is not installed ({error}); run pip install '.[report]'"
        ) from None
    source = files("lesa.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "steps": "{:.4g}".format, "name": name}
    return environment.from_string(source).render(
        **facts,
        title=title,
        images={file: base64.b64encode(png).decode() for file, png in figures.items()},
        duels=facts["paired"],
        headlines=_headlines(comparison.rows, facts["paired"]),
        groups=_groups(comparison.rows),
        has_u8wrap=any("psnr_u8wrap" in row for row in comparison.rows),
        worst=[{"label": p.label, "file": _worst_file(p)} for p in comparison.worst],
        gain=GAIN,
    )


def _headlines(rows: Sequence[Row], found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of lesa's rows against the best peer on its own list, and on searched steps."""
    lines = []
    for row in ours(rows):
        pairs = {duel["b"]: duel for duel in found if duel["a"] == row["label"]}
        mine = [pairs[label] for label in _best_peers(rows, row)]
        lines.append({"count": wanted(row), "row": row, "duels": mine})
    return lines


def _groups(rows: Sequence[Row]) -> list[tuple[int, list[Row]]]:
    """Rows by the largest of lesa's numbers of full steps that they reach, best mean first."""
    counts = [wanted(row) for row in ours(rows)]
    found: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: decibels(row["psnr_mean"]), reverse=True):
        reached = next((count for count in counts if count <= wanted(row)), wanted(row))
        found.setdefault(reached, []).append(row)
    return sorted(found.items(), reverse=True)


def _number(value: float, digits: int = 1, signed: bool = False) -> str:
    if not isfinite(value):
        return "identical"
    return f"{value:{'+' if signed else ''}.{digits}f}"


def rich_table(rows: Iterable[dict[str, Any]], plain_seconds: float, num_steps: int) -> Table:
    """The rows for a terminal: full steps, seconds, speed-up, PSNR mean and p10, cache."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="against the plain run")
    table.add_column("method", no_wrap=True)
    for column in ("full steps", "seconds", "speed-up", "PSNR mean", "PSNR p10", "cache"):
        table.add_column(column, justify="right")
    table.add_row("plain", f"{num_steps}", f"{plain_seconds:.3g}", "1.00x", "-", "-", "-")
    for row in rows:
        table.add_row(
            row["method"] + " (searched)" * is_borrowed(row),
            f"{row['full_steps']:.4g}",
            f"{row['seconds']:.3g}",
            f"{row['speedup']:.2f}x",
            f"{row['psnr_mean']:.1f} dB",
            f"{row['psnr_p10']:.1f} dB",
            readable_bytes(row["cache_bytes"]),
            style="bold green" if row["method"] == "lesa" else None,
        )
    return table


def readable_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
