"""One method's measurements in a comparison, and the row that they make."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from lesa.evaluation.method import Method
from lesa.evaluation.metrics import frame_psnr, psnr, ssim, temporal_psnr
from lesa.evaluation.runs import Run

COLUMNS = (
    "method",
    "schedule",
    "full_steps",
    "psnr_mean",
    "psnr_p10",
    "psnr_min",
    "ssim_mean",
    "seconds",
    "speedup",
    "tflops",
    "cache_bytes",
)
VIDEO_COLUMNS = ("psnr_frame_mean", "psnr_frame_min", "temporal_psnr")


@dataclass
class Tally:
    """One method's measurements, a batch at a time."""

    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    frames: list[float] = field(default_factory=list)  # of videos: dB of every frame
    temporal: list[float] = field(default_factory=list)  # of videos: dB of what moves
    seconds: list[float] = field(default_factory=list)
    speedup: list[float] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)  # [B, S] each
    pictures: list[Tensor] = field(default_factory=list)
    full_steps: list[float] = field(default_factory=list)  # of adaptive methods, as counted
    cache_bytes: int = 0
    tflops: float = 0.0
    fallbacks: dict[str, int] = field(default_factory=dict)

    def add(self, plain: Run, run: Run) -> None:
        self.psnr += psnr(plain.images, run.images).tolist()
        self.ssim += ssim(plain.images, run.images).tolist()
        if plain.images.ndim == 5 and plain.images.shape[1] > 1:
            self.frames += frame_psnr(plain.images, run.images).flatten().tolist()
            self.temporal += temporal_psnr(plain.images, run.images).tolist()
        self.seconds.append(run.seconds)
        self.speedup.append(plain.seconds / run.seconds)
        if run.latents and len(run.latents) == len(plain.latents):
            self.errors.append(_relative_error(plain.latents, run.latents))

    def row(self, method: Method) -> dict[str, Any]:
        decibels = torch.tensor(self.psnr, dtype=torch.float64)
        finite = decibels.clamp(max=1e3)  # identical pictures are infinite: quantiles would be NaN
        values = (
            method.name,
            method.schedule_text,
            fmean(self.full_steps) if self.full_steps else method.full_steps,
            decibels.mean().item(),
            _infinite_if_clamped(finite.quantile(0.1).item()),
            decibels.min().item(),
            fmean(self.ssim),
            median(self.seconds),
            median(self.speedup),
            self.tflops,
            self.cache_bytes,
        )
        row = dict(zip(COLUMNS, values, strict=True))
        if self.frames:
            video = fmean(self.frames), min(self.frames), fmean(self.temporal)
            row |= zip(VIDEO_COLUMNS, video, strict=True)
        return row


def _relative_error(reference: list[Tensor], latents: list[Tensor]) -> Tensor:
    """RMS(x - x_ref) / RMS(x_ref) of each prompt after each step, [B, S]."""
    columns = [
        (ours.float() - base.float()).flatten(1).norm(dim=1) / base.float().flatten(1).norm(dim=1)
        for base, ours in zip(reference, latents, strict=True)
    ]
    return torch.stack(columns, 1).cpu()


def _infinite_if_clamped(decibels: float) -> float:
    return decibels if decibels < 1e3 else float("inf")
