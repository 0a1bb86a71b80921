"""Draw the figures of the docs from docs/figures/flux.json: `python docs/figures/draw.py`.

Measured by docs/figures/measure.py; flow.svg alone shows no numbers. Needs matplotlib.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from flow import flow

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
IMAGES = HERE.parent / "images"
RED, BLUE, ORANGE, GREY = "#c1121f", "#2166ac", "#ee8434", "#6b7280"
LOOKS = {  # colour and name of each run
    "plain": ("#111111", "plain run"),
    "reuse": (GREY, "reuse: the last feature"),
    "line": (BLUE, "a line through the last two"),
    "lesa": (RED, "lesa, trained"),
}
SHOWN = "10"  # full steps of 50 in the pictures of one list


def trajectory(data: dict[str, Any]) -> plt.Figure:
    """The outputs of several runs on two axes, full steps as circles."""
    places, first = data["trajectory"]["places"], 18  # steps; later ones lie on each other
    figure, axis = plt.subplots(figsize=(6.4, 4.6))
    for name in ("reuse", "line", "lesa", "plain"):
        colour, title = LOOKS[name]
        x, y = zip(*places[name][:first], strict=True)
        axis.plot(x, y, color=colour, lw=1.4, marker=".", ms=5, label=title, alpha=0.9)
    for name in ("reuse", "line", "lesa"):
        steps = [step for step in data["lists"][SHOWN] if step < first]
        x, y = zip(*(places[name][step] for step in steps), strict=True)
        axis.plot(x, y, "o", ms=8, mfc="none", color=LOOKS[name][0])
    axis.set(xlabel="first axis", ylabel="second axis")
    axis.set_title("What the denoiser returns, steps 0 to 17")
    axis.legend(fontsize=9, loc="lower right")
    return figure


def distance(data: dict[str, Any]) -> plt.Figure:
    """How far the latents are from the plain run's, step by step."""
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    for name in ("reuse", "line", "lesa"):
        colour, title = LOOKS[name]
        errors = [100 * error for error in data["trajectory"]["errors"][name]]
        axis.plot(errors, color=colour, lw=1.6, label=title)
    for step in data["lists"][SHOWN]:
        axis.axvline(step, color="#dddddd", lw=1, zorder=0)
    axis.set(xlabel="step (grey lines: full steps)", ylim=(0, None))
    axis.set_title("Distance of the latent from the plain run's, %")
    axis.legend(fontsize=9, loc="upper left")
    return figure


def table(data: dict[str, Any]) -> plt.Figure:
    """The coefficients of one list as a picture."""
    rows = list(zip(*data["tables"][SHOWN], strict=True))
    limit = 2.0
    figure, axis = plt.subplots(figsize=(7.2, 2.2))
    image = axis.imshow(rows, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    names = ["newest feature", "one older", "two older", "latent"]
    axis.set(xlabel="step", yticks=range(len(names)), yticklabels=names)
    for step in data["lists"][SHOWN]:
        axis.axvspan(step - 0.5, step + 0.5, color="#444444")
    figure.colorbar(image, ax=axis, extend="both", pad=0.01)
    axis.set_title("Coefficients of a run with 10 of 50 full steps (dark columns)")
    return figure


def ring(data: dict[str, Any]) -> plt.Figure:
    """Which step's feature each slot of the ring holds, step by step."""
    full, last = data["lists"][SHOWN], 21
    figure, axis = plt.subplots(figsize=(7.2, 2.2))
    slots: list[int | None] = [None, None, None]
    newest = -1
    for step in range(last):
        if step in full:
            newest = (newest + 1) % len(slots)
            slots[newest] = step
        for slot, held in enumerate(slots):
            written = step in full and slot == newest
            shade = "#c1121f" if written else "#f4c7c3" if slot == newest else "#eef1f5"
            axis.add_patch(plt.Rectangle((step, slot), 0.94, 0.9, color=shade))
            text, colour = "" if held is None else str(held), "white" if written else "#222222"
            axis.text(
                step + 0.47, slot + 0.45, text, ha="center", va="center", color=colour, fontsize=9
            )
    axis.set(
        xlim=(0, last),
        ylim=(3, 0),
        yticks=[0.45, 1.45, 2.45],
        yticklabels=["slot 0", "slot 1", "slot 2"],
    )
    axis.set_xticks([s + 0.47 for s in range(last)], range(last), fontsize=8)
    axis.set(xlabel="step")
    axis.set_title("The step whose feature a slot holds (red: written, pink: the newest one)")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    return figure


def search(data: dict[str, Any]) -> plt.Figure:
    """The step lists of the races, the best one on top, with what they reached."""
    raced = [race for race in data["races"] if str(len(race["full_steps"])) == SHOWN]
    few = min(race["prompts"] for race in raced)
    most = sorted({race["prompts"] for race in raced})[1]
    first = {tuple(r["full_steps"]): r["dB"] for r in raced if r["prompts"] == few}
    second = {tuple(r["full_steps"]): r["dB"] for r in raced if r["prompts"] == most}
    order = sorted(first, key=lambda steps: (second.get(steps, -99), first[steps]))
    chosen = tuple(data["lists"][SHOWN])
    figure, axis = plt.subplots(figsize=(7.2, 3.4))
    for line, steps in enumerate(order):
        colour = RED if steps == chosen else BLUE if steps in second else GREY
        axis.plot([0, 49], [line, line], color="#e5e7eb", lw=1, zorder=0)
        axis.plot(steps, [line] * len(steps), "o", color=colour, ms=6)
        axis.text(52.5, line, f"{first[steps]:.1f}", va="center", color=colour)
        axis.text(
            59.5, line, f"{second[steps]:.1f}" if steps in second else "", va="center", color=colour
        )
    top = len(order) - 0.2
    axis.text(52.5, top, f"{few} prompts", fontsize=8, rotation=25, va="bottom")
    axis.text(59.5, top, f"{most} prompts", fontsize=8, rotation=25, va="bottom")
    axis.text(49.5, top + 0.6, "dB", fontsize=8, va="bottom")
    axis.set(xlim=(-1, 65), yticks=[], xlabel="full steps of 50")
    axis.set_xticks(range(0, 50, 5))
    axis.spines[:].set_visible(False)
    return figure


FIGURES = [trajectory, distance, table, ring, search, flow]


def main() -> None:
    data = json.loads((HERE / "flux.json").read_text())
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "lesa", "font.size": 10}
    for draw in FIGURES:
        figure = draw(data)
        figure.savefig(
            IMAGES / f"{draw.__name__}.svg", bbox_inches="tight", metadata={"Date": None}
        )
        plt.close(figure)


if __name__ == "__main__":
    main()
