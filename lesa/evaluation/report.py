"""A comparison as files: report.json, report.html and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lesa.errors import LesaError
from lesa.evaluation.charts import X_LABELS, duels_png, errors_png, quality_png
from lesa.evaluation.comparison import PLAIN, Comparison, Worst, attempted
from lesa.evaluation.plots import grid_png, require_matplotlib, sheet_png
from lesa.evaluation.ranking import Row, duels
from lesa.evaluation.tables import readable_bytes, rich_table
from lesa.evaluation.views import COLUMNS, in_grid
from lesa.util.files import require_writable, write_atomically
from lesa.util.strict_json import to_json
from lesa.util.versions import versions

__all__ = ["readable_bytes", "require_extra", "rich_table", "write_report"]


def require_extra() -> None:
    """Call it before measuring: a report's packages are there.

    Raises: LesaError if matplotlib or jinja2 is not installed.
    """
    require_matplotlib()
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise LesaError(
            f"report: jinja2 is not installed ({error}); run pip install '.[report]'"
        ) from None


def write_report(
    comparison: Comparison,
    folder: str | Path,
    *,
    title: str = "lesa: accelerated against plain",
    shown: Sequence[str] | None = None,
    extra: dict[str, Any] | None = None,
) -> dict[str, Path]:
    """Write report.json, report.html (self-contained) and every figure as PNG: a grid of pictures,
    quality against full steps, seconds and TFLOP, error per step, and of lesa's rows the paired
    differences and the worst prompts.

    report.json is written first. A figure that fails is left out, and a note of the comparison
    says why. `shown` names the methods whose pictures are shown beside the plain run's; by default
    they are lesa and the best peer at each of its numbers of full steps. `extra` goes into
    report.json. Rows may carry `limit`, a bound of the mean in dB: it is drawn as a line of its
    own. Returns the files by name.

    Raises: LesaError if the folder cannot be written, or after report.json if the extra `report`
    is not installed.
    """
    from lesa.evaluation.page import html

    folder = require_writable(folder)
    found = duels(comparison.rows)
    known = len(comparison.notes)

    def facts() -> str:
        told = comparison.to_dict() | {"paired": found, "versions": versions()}
        return to_json(told | (extra or {}))

    def save(file: str, content: bytes | str) -> None:
        files[file] = write_atomically(folder / file, content)

    files: dict[str, Path] = {}
    save("report.json", facts())
    require_extra()
    figures = _drawn(comparison, found, in_grid(comparison.rows, shown))
    for file, png in figures.items():
        save(file, png)
    save("report.html", html(comparison, found, title, figures, shown))
    if len(comparison.notes) > known:
        save("report.json", facts())
    return files


def _drawn(
    comparison: Comparison, found: Sequence[dict[str, Any]], labels: Sequence[str]
) -> dict[str, bytes]:
    """The figures that could be drawn, and a note of each other one."""
    made = {
        file: attempted(comparison, file, draw)
        for file, draw in _figures(comparison, found, labels)
    }
    return {file: png for file, png in made.items() if png is not None}


def _figures(
    comparison: Comparison, found: Sequence[dict[str, Any]], labels: Sequence[str]
) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The name of each figure, and what draws it."""
    rows = comparison.rows
    for x in X_LABELS:
        name = f"quality-{x.replace('_', '-')}.png"
        yield name, lambda x=x: quality_png(rows, x, _limit(rows, x))  # type: ignore[misc]
    yield "error-per-step.png", lambda: errors_png(comparison.curves, rows)
    if found:
        yield "paired.png", lambda: duels_png(found, rows)
    for part in comparison.worst:
        yield _worst_file(part), lambda part=part: _sheet(part)  # type: ignore[misc]
    pictures = {label: comparison.pictures[label] for label in (PLAIN, *labels)}
    yield "grid.png", lambda: grid_png(pictures, comparison.titles[:COLUMNS])


def _sheet(part: Worst) -> bytes:
    return sheet_png(part.pictures, part.prompts, part.decibels)


def _worst_file(part: Worst) -> str:
    return f"worst-{part.label.rsplit('@', 1)[1]}.png"


def _limit(rows: Sequence[Row], x: str) -> dict[str, list[tuple[float, float]]]:
    points = sorted((row[x], row["limit"]) for row in rows if "limit" in row)
    return {"least-squares bound": points} if points else {}
