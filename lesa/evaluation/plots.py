"""Pictures of results, as PNG bytes: nothing is shown, nothing is downloaded."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lesa.errors import LesaError
from lesa.evaluation.pictures import shown_frames
from lesa.evaluation.printable import printable


def grid_png(rows: Mapping[str, Tensor], titles: Sequence[str]) -> bytes:
    """Pictures side by side: one row per label, one column per prompt.

    `rows` are [n, C, H, W]; of videos [n, F, C, H, W] each is a strip of frames.
    """
    columns = min(len(titles), *(len(pictures) for pictures in rows.values()))
    shown = {label: [_strip(p) for p in pictures[:columns]] for label, pictures in rows.items()}
    height, width, _ = next(iter(shown.values()))[0].shape
    figure, axes = canvas(
        len(rows), columns, squeeze=False, figsize=(1.7 * columns * width / height, 1.7 * len(rows))
    )
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.04, hspace=0.04)
    for line, (label, pictures) in zip(axes, shown.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(_wrapped(label, 14), rotation=0, ha="right", va="center", fontsize=9)
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(_wrapped(title, round(20 * width / height), 5), fontsize=6.5)
    return figure_png(figure)


def sheet_png(
    worst: Mapping[str, Tensor], prompts: Sequence[str], decibels: Mapping[str, Sequence[float]]
) -> bytes:
    """A line per prompt, a column per label, the first being the reference, and behind it each
    other one's difference from it, `GAIN` times and around grey.

    `worst` are [n, C, H, W] or videos [n, F, C, H, W]; `decibels` are written under the pictures.
    """
    (_, plain), *others = worst.items()
    columns = {label: [_strip(p) for p in pictures] for label, pictures in worst.items()}
    for label, pictures in others:
        error = 0.5 + GAIN * (pictures - plain)
        columns[f"{label}, error x {GAIN}"] = [_strip(p) for p in error]
    height, width, _ = columns[next(iter(worst))][0].shape
    size = 1.7 * width / height
    figure, axes = canvas(
        len(prompts), len(columns), squeeze=False,
        figsize=(size * len(columns), 1.95 * len(prompts)),
    )  # fmt: skip
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.04, hspace=0.14)
    for column, (label, strips) in enumerate(columns.items()):
        axes[0][column].set_title(_wrapped(label, round(13 * size)), fontsize=9)
        for line, picture in enumerate(strips):
            axes[line][column].imshow(picture, interpolation="nearest")
            axes[line][column].set(xticks=[], yticks=[])
            if label in decibels:
                axes[line][column].set_xlabel(f"{decibels[label][line]:.1f} dB", fontsize=8)
    for line, prompt in zip(axes, prompts, strict=True):
        text = _wrapped(prompt, 26, 7)
        line[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8, labelpad=6)
    return figure_png(figure)


def table_png(table: Any, title: str = "") -> bytes:
    """A table of coefficients as a heat map: steps to the right, cached features downwards."""
    values = table.coefficients.T.numpy()  # [K + latent, S]
    limit = max(abs(values).max(), 1e-9)
    figure, axis = canvas(1, 1, figsize=(0.17 * values.shape[1] + 2.2, 0.35 * len(values) + 1.3))
    image = axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    names = [f"{k} back" for k in range(1, table.history + 1)]
    axis.set_yticks(range(len(values)), [*names, "latent"][: len(values)])
    axis.set(xlabel="step (blank = full)", title=title)
    figure.colorbar(image, ax=axis, label="coefficient")
    return figure_png(figure)


def worth_png(lines: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes:
    """What calibrated lists are worth: PSNR (mean, p10, minimum) over the predicted speed-up, and
    the number of full steps at each point; a colour per line, such as "of 50 steps".

    The points of a line have mean, p10, minimum, speedup and full_steps.
    """
    figure, axis = canvas(1, 1, figsize=(7, 4.2))
    looks = {"mean": ("-", "o"), "p10": ("--", "s"), "minimum": (":", "v")}
    for number, (label, points) in enumerate(lines.items()):
        ordered = sorted(points, key=lambda point: point["speedup"])
        places = [point["speedup"] for point in ordered]
        for key, (style, marker) in looks.items():
            values = [point[key] for point in ordered]
            axis.plot(
                places, values, ls=style, marker=marker, color=f"C{number}", label=f"{key} {label}"
            )
        for point in ordered:
            axis.annotate(
                f"{point['full_steps']} full", (point["speedup"], point["mean"]),
                xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8,
            )  # fmt: skip
    axis.set(xlabel="predicted speed-up of the denoising", ylabel="PSNR against the plain run, dB")
    axis.margins(0.08, 0.12)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8.5, frameon=False)
    return figure_png(figure)


GAIN = 8  # of errors that are shown as pictures


def require_matplotlib() -> Any:
    """matplotlib's class of figures.

    Raises: LesaError if it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LesaError(
            f"report: matplotlib is not installed ({error}); run pip install '.[report]'"
        ) from None
    return Figure


def canvas(rows: int, columns: int, *, figsize: tuple[float, float], **shared: Any) -> Any:
    """A figure and its axes, as of `pyplot.subplots`, that knows no window and no global state."""
    figure = require_matplotlib()(figsize=figsize)
    return figure, figure.subplots(rows, columns, **shared)


def _strip(picture: Tensor) -> Any:
    """[C, H, W] -> [H, W, C]; a video [F, C, H, W] shows frames from first to last, [H, n W, C]."""
    side_by_side = torch.cat(list(shown_frames(picture).values()), dim=-1)
    return side_by_side.clamp(0, 1).movedim(0, -1).numpy()


def _wrapped(text: str, width: int, lines: int = 9) -> str:
    """A text in lines of a width, of which a figure has room for some."""
    width = max(width, 8)
    return "\n".join(textwrap.wrap(printable(text, lines * width), width)[:lines])


def figure_png(figure: Any) -> bytes:
    """The figure as PNG, cut to what is drawn.

    Every text is plain text: a prompt may hold what matplotlib takes for a formula.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set(parse_math=False, usetex=False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box is drawn for it
        figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    return buffer.getvalue()
