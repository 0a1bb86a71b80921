"""A comparison as files: a picture grid, the error per step, report.html and report.json."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lesa.errors import LesaError
from lesa.evaluation.compare import PLAIN, Comparison
from lesa.evaluation.plots import curves_png, grid_png
from lesa.files import require_writable, to_json, write_atomically
from lesa.versions import versions

GRID_COLUMNS = 8


def write_report(
    comparison: Comparison,
    folder: str | Path,
    *,
    title: str = "lesa: accelerated against plain",
    shown: Sequence[str] | None = None,
    extra: dict[str, Any] | None = None,
) -> dict[str, Path]:
    """Write grid.png, error-per-step.png, report.html (self-contained) and report.json.

    `shown` names the methods in the grid, the plain run comes first; all of them by default.
    `extra` goes into report.json. Returns the files by name.

    Raises: LesaError if the folder cannot be written or an extra is not installed.
    """
    folder = require_writable(folder)
    labels = [label for label in comparison.pictures if label != PLAIN]
    labels = [label for label in labels if shown is None or label.split(" @")[0] in shown]
    shown_pictures = {label: comparison.pictures[label] for label in (PLAIN, *labels)}
    grid = grid_png(shown_pictures, comparison.titles[:GRID_COLUMNS])
    counts = {label: int(label.rsplit("@", 1)[1]) for label in comparison.curves}
    curves = curves_png(comparison.curves, counts)
    facts = {**comparison.to_dict(), "versions": versions(), **(extra or {})}
    contents: dict[str, bytes | str] = {
        "grid.png": grid,
        "error-per-step.png": curves,
        "report.html": _html(facts, title, grid, curves),
        "report.json": to_json(facts),
    }
    return {name: write_atomically(folder / name, data) for name, data in contents.items()}


def _html(facts: dict[str, Any], title: str, grid: bytes, curves: bytes) -> str:
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise LesaError(
            f"report: jinja2 is not installed ({error}); run pip install '.[report]'"
        ) from None
    source = files("lesa.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    images = {
        "grid": base64.b64encode(grid).decode(),
        "curves": base64.b64encode(curves).decode(),
    }
    return Environment(autoescape=True).from_string(source).render(title=title, **facts, **images)


def rich_table(rows: Iterable[dict[str, Any]], plain_seconds: float, num_steps: int) -> Table:
    """The rows for a terminal: full steps, seconds, speed-up, PSNR mean and worst decile, cache."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="against the plain run")
    table.add_column("method", no_wrap=True)
    for name in ("full steps", "seconds", "speed-up", "PSNR mean", "worst decile", "cache"):
        table.add_column(name, justify="right")
    table.add_row("plain", f"{num_steps}", f"{plain_seconds:.3g}", "1.00x", "-", "-", "-")
    for row in rows:
        table.add_row(
            row["method"] + (" (searched)" if _borrowed(row) else ""),
            f"{row['full_steps']}",
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


def _borrowed(row: dict[str, Any]) -> bool:
    return row["method"] != "lesa" and row["schedule"].startswith("searched")
