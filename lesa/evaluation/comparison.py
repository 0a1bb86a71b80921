"""What a comparison measured: rows, curves, pictures and notes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

PLAIN = "plain"
Made = TypeVar("Made")


@dataclass
class Worst:
    """The prompts on which one of lesa's rows is worst, plain, by lesa and by the best peer.

    Attributes:
        label: The row's.
        prompts: The prompts of the pictures, worst first.
        decibels: Label -> PSNR of each.
        pictures: Label (and "plain") -> [n, C, H, W], or videos.
    """

    label: str
    prompts: list[str]
    decibels: dict[str, list[float]]
    pictures: dict[str, Tensor]


@dataclass
class Comparison:
    """What `compare` measured.

    Attributes:
        rows: One dict per method, with the keys `COLUMNS`, for videos also `VIDEO_COLUMNS`:
            decibels against the plain run's pictures (psnr lists them, psnr_mean is their mean,
            psnr_p10 their 10th percentile, each with a 95 % bootstrap interval; psnr_frame_* are
            over frames, temporal_psnr is of the differences between frames), seconds of the
            denoising loop for one batch, speedup over the plain loop in the same round, tflops of
            one prompt's loop, cache_bytes held during a batch, cpu_seconds that the process
            computed during the loop. Where they apply: peak_bytes that CUDA allocated on top during
            a batch, scores of the judges, `LPIPS_COLUMNS` (the mean, the largest, and the interval
            of the mean), full_step_list where a schedule says which steps are full, psnr_u8wrap of
            the paper's own recipe.
        curves: Label -> relative RMS error of the latent after each step, mean over prompts.
        pictures: Label (and "plain") -> the first pictures, [n, C, H, W] in [0, 1], or videos,
            [n, F, C, H, W]; `titles` are the prompts of all pictures.
        noise_levels: Of the plain run, before each step and after the last one; empty where the
            scheduler has none.
        worst: The prompts on which each of lesa's rows is worst.
        lpips_missing: Why no row has LPIPS, None where it was measured.
        notes: Steps that a cache had to run in full, by reason, and what could not be measured,
            methods that failed among it.
    """

    prompts: list[str]
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    pictures: dict[str, Tensor] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    noise_levels: list[float] = field(default_factory=list)
    worst: list[Worst] = field(default_factory=list)
    lpips_missing: str | None = None
    seed: int = 0
    plain_seconds: float = 0.0
    plain_tflops: float = 0.0
    plain_more: dict[str, Any] = field(default_factory=dict)  # cpu_seconds, peak_bytes, scores

    def scores(self) -> dict[str, dict[str, float]]:
        """Label (and "plain") -> name -> mean of what a judge said, where one was asked."""
        judged = {PLAIN: self.plain_more, **{row["label"]: row for row in self.rows}}
        return {
            label: {name: found["value"] for name, found in part["scores"].items()}
            for label, part in judged.items()
            if "scores" in part
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures."""
        return {
            "settings": _described(self.settings),
            "seed": self.seed,
            "prompts": self.prompts,
            "plain": {
                "seconds": self.plain_seconds,
                "tflops": self.plain_tflops,
                **self.plain_more,
            },
            "rows": self.rows,
            "error_per_step": self.curves,
            "noise_levels": self.noise_levels,
            "notes": self.notes,
        }


def attempted(comparison: Comparison, what: str, make: Callable[[], Made]) -> Made | None:
    """What `make` gives; where it fails, None and a note: measurements outlive every picture."""
    try:
        return make()
    except Exception as error:
        lines = str(error).splitlines() or [""]
        comparison.notes.append(f"{what} was not made: {type(error).__name__}: {lines[0]}")
        return None


def _described(value: Any) -> Any:
    """A setting as JSON: of what has no such form, an embedding say, its kind and shape."""
    if value is None or isinstance(value, str | int | float | bool | Path):
        return value
    if isinstance(value, Mapping):
        return {key: _described(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_described(part) for part in value]
    shape = f" {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    return f"{type(value).__name__}{shape}"
