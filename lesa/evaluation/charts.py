"""Charts of a comparison's rows, as PNG bytes (how they look: `chart_style`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from lesa.evaluation.chart_style import EXTRA, FAMILIES, Style, family, legend, look, styles
from lesa.evaluation.plots import canvas, figure_png
from lesa.evaluation.ranking import (
    OURS,
    Row,
    decibels,
    is_borrowed,
    name,
    opponents,
    ours,
    wanted,
)

X_LABELS = {
    "full_steps": "full steps",
    "seconds": "seconds of the denoising loop, one batch",
    "tflops": "TFLOP of the denoising loop, one prompt",
}


def quality_png(
    rows: Sequence[Row],
    x: str = "full_steps",
    extra: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> bytes:
    """PSNR, mean and 10th percentile (p10) with 95 % intervals, against a column of the rows.

    `extra` are named lines of (x, dB) in the panel of the mean, such as a bound.
    """
    drawn = styles(rows)
    height = max(5.0, 1.4 + 0.22 * len(drawn))  # as high as the legend
    figure, panels = canvas(1, 2, figsize=(11.5, height), sharey=True)
    for panel, key, title in zip(panels, ("psnr_mean", "psnr_p10"), _TITLES, strict=True):
        for line in _lines(rows).values():
            _draw_line(panel, sorted(line, key=lambda row: row[x]), x, key, drawn)
        panel.set(title=title, xlabel=X_LABELS[x])
        panel.grid(alpha=0.25, which="major")
        _readable_axis(panel, [row[x] for row in rows])
    for label, points in (extra or {}).items():
        panels[0].plot(*zip(*points, strict=True), ":", color=EXTRA, lw=1.5, label=label)
    panels[0].set_ylabel("PSNR against the plain run, dB")
    legend(figure, drawn, list(extra or {}), any(is_borrowed(row) for row in rows))
    figure.subplots_adjust(wspace=0.05)
    return figure_png(figure)


def duels_png(found: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> bytes:
    """lesa minus every peer in dB, with paired intervals: a panel per number of full steps, a line
    per peer, the strongest at the top."""
    by_label = {row["label"]: row for row in rows}
    groups = list(dict.fromkeys(duel["a"] for duel in found))
    strength: dict[str, list[float]] = {}
    for duel in found:
        strength.setdefault(name(by_label[duel["b"]]), []).append(duel["mean"]["value"])
    order = sorted(strength, key=lambda peer: min(strength[peer]))
    figure, panels = canvas(
        1, len(groups), squeeze=False, sharey=True,
        figsize=(2.2 + 2.9 * len(groups), 1.3 + 0.24 * len(order)),
    )  # fmt: skip
    for panel, group in zip(panels[0], groups, strict=True):
        for duel in (duel for duel in found if duel["a"] == group):
            peer = by_label[duel["b"]]
            place, colour = order.index(name(peer)), FAMILIES[family(peer["method"])][0]
            for key, shift, fill in (("mean", -0.16, colour), ("p10", 0.16, "white")):
                part = duel[key]
                if all(isfinite(part[end]) for end in ("value", "low", "high")):
                    panel.plot([part["low"], part["high"]], [place + shift] * 2, color=colour, lw=1)
                    panel.plot(part["value"], place + shift, "o", ms=4, color=colour, mfc=fill)
        panel.axvline(0, color="#111111", lw=1)
        panel.grid(alpha=0.25)
        panel.set(title=f"{group.rsplit('@', 1)[1]} full steps", xlabel="dB")
    panels[0][0].set_yticks(range(len(order)), order, fontsize=8)
    panels[0][0].set_ylim(len(order) - 0.5, -0.5)  # the strongest at the top
    figure.subplots_adjust(wspace=0.06)
    return figure_png(figure)


def errors_png(curves: Mapping[str, Sequence[float]], rows: Sequence[Row]) -> bytes:
    """Error of the latent after each step, logarithmic: a panel per number of full steps.

    Markers stand on the full steps; a method that chooses them anew for each prompt has a single
    one, at the end.
    """
    from matplotlib.ticker import MaxNLocator

    counts = [wanted(row) for row in ours(rows)] or sorted({wanted(row) for row in rows})[::-1]
    columns = min(2, len(counts))
    lines = -(-len(counts) // columns)
    drawn = styles([row for row in rows if row["label"] in curves])
    height = max(0.6 + 3.4 * lines, 1.4 + 0.22 * len(drawn))
    figure, panels = canvas(
        lines, columns, squeeze=False, sharex=True, sharey=True,
        figsize=(11.5 if columns == 2 else 7, height),
    )  # fmt: skip
    for panel, number in zip(panels.flat, counts, strict=False):
        mine = [row for row in ours(rows) if wanted(row) == number]
        for row in [*reversed(opponents(rows, number)), *mine]:
            _draw_error(panel, curves.get(row["label"], ()), row, drawn)
        panel.set(yscale="log", title=f"{number} full steps")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        panel.grid(alpha=0.25)
    for panel in list(panels.flat)[len(counts) :]:
        panel.set_visible(False)
    figure.supxlabel("step", y=0.0, fontsize=10)
    for first in panels[:, 0]:
        first.set_ylabel("relative error of the latent")
    legend(figure, drawn, [], any(is_borrowed(row) for row in rows))
    figure.subplots_adjust(wspace=0.05, hspace=0.18)
    return figure_png(figure)


_TITLES = ("mean over the prompts", "10th percentile of the prompts (p10)")


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of one method on one kind of list; lesa's last, so that it is drawn on top."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["method"] == OURS):
        found.setdefault(name(row), []).append(row)
    return found


def _draw_line(
    panel: Any, line: Sequence[Row], x: str, key: str, drawn: Mapping[str, Style]
) -> None:
    shown = [row for row in line if isfinite(decibels(row[key]))]
    if not shown:
        return
    values = [row[key] for row in shown]
    ends = [row.get(f"{key}_interval") or (row[key], row[key]) for row in shown]
    bars = [
        [value - low for value, (low, _) in zip(values, ends, strict=True)],
        # Identical pictures among the prompts: the upper end is open.
        [
            min(decibels(high), value + 20) - value
            for value, (_, high) in zip(values, ends, strict=True)
        ],
    ]
    places = [row[x] for row in shown]
    drawing = look(shown[0], drawn[shown[0]["method"]])
    panel.errorbar(places, values, bars, elinewidth=0.8, **drawing)


def _draw_error(panel: Any, curve: Sequence[float], row: Row, drawn: Mapping[str, Style]) -> None:
    # Until its first skipped step a run equals the plain one: zero has no place on a log axis.
    points = [(step, error) for step, error in enumerate(curve) if error > 0]
    if points:
        full = set(row.get("full_step_list", ()))
        marked = [place for place, (step, _) in enumerate(points) if step in full]
        every = marked if "full_step_list" in row else [len(points) - 1]
        panel.plot(*zip(*points, strict=True), markevery=every, **look(row, drawn[row["method"]]))


def _readable_axis(panel: Any, values: Sequence[float]) -> None:
    """Plain numbers; logarithmic where the values span more than a factor of three."""
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    if min(values) > 0 and max(values) > 3 * min(values):
        panel.set_xscale("log")
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(ScalarFormatter())
    whole = all(float(value).is_integer() for value in values)
    panel.xaxis.set_major_locator(MaxNLocator(7, integer=whole))
