"""Pictures of results, as PNG bytes: nothing is shown, nothing is downloaded."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lesa.errors import LesaError


def grid_png(rows: Mapping[str, Tensor], titles: Sequence[str]) -> bytes:
    """Pictures side by side: one row per label, one column per prompt.

    `rows` are [n, C, H, W]; of videos [n, F, C, H, W] each is a strip of frames.
    """
    plt = _pyplot()
    columns = min(len(titles), *(len(pictures) for pictures in rows.values()))
    shown = {label: [_strip(p) for p in pictures[:columns]] for label, pictures in rows.items()}
    height, width, _ = next(iter(shown.values()))[0].shape
    figure, axes = plt.subplots(
        len(rows), columns, squeeze=False, figsize=(1.7 * columns * width / height, 1.7 * len(rows))
    )
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.04, hspace=0.04)
    for line, (label, pictures) in zip(axes, shown.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(
            "\n".join(textwrap.wrap(label, 14)), rotation=0, ha="right", va="center", fontsize=9
        )
    for axis, title in zip(axes[0], titles, strict=False):
        lines = textwrap.wrap(title, round(20 * width / height))[:5]
        axis.set_title("\n".join(lines), fontsize=6.5)
    return _png(figure)


def curves_png(curves: Mapping[str, Sequence[float]], full_steps: Mapping[str, int]) -> bytes:
    """Error of the latent after each step, logarithmic: a colour per method, a style per count."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    styles = dict(zip(dict.fromkeys(full_steps.values()), _STYLES, strict=False))
    names = list(dict.fromkeys(label.split(" @")[0] for label in curves))
    for label, curve in curves.items():
        # Until its first skipped step a run equals the plain one: zero has no place on a log axis.
        points = [(step, error) for step, error in enumerate(curve) if error > 0]
        if points:
            axis.plot(
                *zip(*points, strict=True),
                styles.get(full_steps.get(label, 0), "-"),
                color=f"C{names.index(label.split(' @')[0])}",
                label=label,
            )
    axis.set(yscale="log", xlabel="step", ylabel="relative error of the latent")
    axis.grid(alpha=0.3, which="both")
    if curves:
        axis.legend(fontsize=8, title="method @ full steps")
    return _png(figure)


def table_png(table: Any, title: str = "") -> bytes:
    """A table of coefficients as a heat map: steps to the right, cached features downwards."""
    plt = _pyplot()
    values = table.coefficients.T.numpy()  # [K + latent, S]
    limit = max(abs(values).max(), 1e-9)
    figure, axis = plt.subplots(figsize=(0.17 * values.shape[1] + 2.2, 0.35 * len(values) + 1.3))
    image = axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    names = [f"{k} back" for k in range(1, table.history + 1)]
    axis.set_yticks(range(len(values)), [*names, "latent"][: len(values)])
    axis.set(xlabel="step (blank = full)", title=title)
    figure.colorbar(image, ax=axis, label="coefficient")
    return _png(figure)


_STRIP = 5  # frames of a video that a report shows
_STYLES = ("-", "--", ":", "-.")


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise LesaError(
            f"report: matplotlib is not installed ({error}); run pip install '.[report]'"
        ) from None
    matplotlib.use("Agg")  # no window, on any machine
    from matplotlib import pyplot

    return pyplot


def _strip(picture: Tensor) -> Any:
    """[C, H, W] -> [H, W, C]; a video [F, C, H, W] shows frames from first to last, [H, n W, C]."""
    if picture.ndim == 4:
        chosen = torch.linspace(0, len(picture) - 1, min(_STRIP, len(picture))).round().long()
        picture = torch.cat(list(picture[chosen]), dim=-1)
    return picture.clamp(0, 1).movedim(0, -1).numpy()


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    _pyplot().close(figure)
    return buffer.getvalue()
