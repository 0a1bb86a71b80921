"""The diagram of docs/architecture.md: how data flows from training to a forecast."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

COLOURS = {"training": "#fdebd8", "forecasters": "#e3edf8", "engine": "#fde3e1"}
BOXES = {  # name: (centre, room, text)
    "prompts": ((1.2, 6.9), "training", "calibration\nprompts"),
    "collect": ((3.4, 6.9), "training", "collect"),
    "statistics": ((5.6, 6.9), "training", "statistics:\ninner products"),
    "search": ((8.4, 7.5), "training", "search: which\nsteps are full"),
    "fit": ((8.4, 6.3), "training", "fit on\nplain runs"),
    "closed": ((11.4, 6.9), "training", "fit on accelerated\nruns (closed loop)"),
    "forecaster": ((11.4, 4.9), "forecasters", "LesaForecaster\n(a folder)"),
    "free": ((6.6, 4.9), "forecasters", "Prior, Reuse, Taylor, ...\n(nothing to train)"),
    "table": ((9.7, 3.85), "forecasters", "table\n[steps, K (+ latent)]"),
    "call": ((1.2, 1.6), "engine", "call of the\ndenoiser"),
    "clock": ((3.3, 1.6), "engine", "which step,\nwhich branch?"),
    "full": ((5.6, 2.4), "engine", "full step:\nall blocks run"),
    "ring": ((7.8, 2.4), "engine", "ring: the K\nnewest features"),
    "skipped": ((5.6, 0.8), "engine", "skipped step:\nno block runs"),
    "mix": ((9.7, 0.8), "engine", "mix: one row of\nthe table"),
    "out": ((11.9, 0.8), "engine", "forecast for\nthe sampler"),
}
ARROWS = (
    "prompts collect", "collect statistics", "statistics search", "statistics fit", "search closed",
    "fit closed", "closed forecaster", "forecaster table", "free table", "call clock", "clock full",
    "clock skipped", "full ring", "skipped mix", "ring mix", "mix out", "table mix",
)  # fmt: skip
SIZE = {"free": (2.6, 0.9), "closed": (2.0, 0.9), "table": (2.1, 0.9)}


def flow(_: Any) -> plt.Figure:
    """Boxes in the colour of their part, and arrows between them."""
    figure, axis = plt.subplots(figsize=(10.5, 6.6))
    bands = {"training": (5.65, 8.25), "forecasters": (3.3, 5.6), "engine": (0.2, 3.3)}
    words = {"training": "chooses tables", "forecasters": "make tables", "engine": "runs tables"}
    for room, (low, high) in bands.items():
        axis.axhspan(low, high - 0.1, color=COLOURS[room], alpha=0.45, lw=0)
        axis.text(0.15, high - 0.25, f"{room}: {words[room]}", fontsize=9, va="top", weight="bold")
    for name, ((x, y), room, text) in BOXES.items():
        width, height = SIZE.get(name, (1.7, 0.9))
        corner = (x - width / 2, y - height / 2)
        style = "round,pad=0,rounding_size=0.12"
        box = FancyBboxPatch(
            corner, width, height, boxstyle=style, fc=COLOURS[room], ec="#555555", lw=1
        )
        axis.add_patch(box)
        axis.text(x, y, text, ha="center", va="center", fontsize=8.5)
    for arrow in ARROWS:
        start, end = arrow.split()
        axis.annotate("", **_between(start, end))
    axis.set(xlim=(0, 13), ylim=(0.1, 8.3))
    axis.axis("off")
    return figure


def _between(start: str, end: str) -> dict[str, Any]:
    """An arrow from the edge of one box to that of another."""
    (x, y), (to_x, to_y) = BOXES[start][0], BOXES[end][0]
    return {
        "xy": _edge(end, x, y),
        "xytext": _edge(start, to_x, to_y),
        "arrowprops": {
            "arrowstyle": "-|>",
            "color": "#333333",
            "lw": 1.1,
            "shrinkA": 0,
            "shrinkB": 0,
        },
    }


def _edge(name: str, x: float, y: float) -> tuple[float, float]:
    """Where the line from a box's centre to a point leaves the box."""
    (own_x, own_y), _, _ = BOXES[name]
    width, height = SIZE.get(name, (1.7, 0.9))
    along, up = x - own_x, y - own_y
    share = min(width / 2 / abs(along) if along else 9e9, height / 2 / abs(up) if up else 9e9)
    return own_x + share * along, own_y + share * up
