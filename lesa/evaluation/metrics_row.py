"""One method's measurements in a comparison, and the row that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from lesa.evaluation.intervals import bootstrap, mean, percentile_10
from lesa.evaluation.judges import LPIPS, Judge
from lesa.evaluation.method import Method
from lesa.evaluation.metrics import frame_psnr, psnr, psnr_u8wrap, ssim, temporal_psnr
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
    "label",
    "psnr",
    "psnr_mean_interval",
    "psnr_p10_interval",
    "cpu_seconds",
)
LPIPS_COLUMNS = ("lpips_mean", "lpips_max", "lpips_mean_interval")  # where it is measured
VIDEO_COLUMNS = ("psnr_frame_mean", "psnr_frame_min", "temporal_psnr")
PAPER = "lesa-paper"  # the paper's own recipe, which alone is also read in the paper's own PSNR


@dataclass
class MetricsRow:
    """One method's measurements, a batch at a time."""

    psnr: list[float] = field(default_factory=list)
    u8wrap: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    frames: list[float] = field(default_factory=list)  # of videos: dB of every frame
    temporal: list[float] = field(default_factory=list)  # of videos: dB of what moves
    judged: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    speedup: list[float] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)  # [B, S] each
    pictures: list[Tensor] = field(default_factory=list)
    full_steps: list[float] = field(default_factory=list)  # of adaptive methods, as counted
    cache_bytes: int = 0
    peak_bytes: int | None = None  # None where the device does not count
    tflops: float = 0.0
    fallbacks: dict[str, int] = field(default_factory=dict)

    def add(self, plain: Run, run: Run) -> None:
        self.psnr += psnr(plain.images, run.images).tolist()
        self.u8wrap += psnr_u8wrap(plain.images, run.images).tolist()
        self.ssim += ssim(plain.images, run.images).tolist()
        if plain.images.ndim == 5 and plain.images.shape[1] > 1:
            self.frames += frame_psnr(plain.images, run.images).flatten().tolist()
            self.temporal += temporal_psnr(plain.images, run.images).tolist()
        self.seconds.append(run.seconds)
        self.cpu_seconds.append(run.cpu_seconds)
        self.speedup.append(plain.seconds / run.seconds)
        if run.latents and len(run.latents) == len(plain.latents):
            self.errors.append(_relative_error(plain.latents, run.latents))

    def judge(self, judges: Sequence[Judge], plain: Run, run: Run, prompts: Sequence[str]) -> None:
        """Let every judge see a batch."""
        for judge in judges:
            for name, values in judge(plain.images, run.images, prompts).items():
                self.judged.setdefault(name, []).extend(values.tolist())

    def scores(self, plain: MetricsRow) -> dict[str, dict[str, Any]]:
        """What the judges found: the mean with its interval, and with a paired one the difference
        from the plain run."""
        return {
            name: {
                **bootstrap(mean, values),
                "difference": bootstrap(lambda a, b: mean(a - b), values, plain.judged[name]),
            }
            for name, values in self.judged.items()
            if name != LPIPS
        }

    def row(self, method: Method, plain: MetricsRow) -> dict[str, Any]:
        average, tail = bootstrap(mean, self.psnr), bootstrap(percentile_10, self.psnr)
        values = (
            method.name,
            method.schedule_text,
            fmean(self.full_steps) if self.full_steps else method.full_steps,
            average["value"],
            tail["value"],
            min(self.psnr),
            fmean(self.ssim),
            median(self.seconds),
            median(self.speedup),
            self.tflops,
            self.cache_bytes,
            method.label,
            self.psnr,
            [average["low"], average["high"]],
            [tail["low"], tail["high"]],
            median(self.cpu_seconds),
        )
        row: dict[str, Any] = dict(zip(COLUMNS, values, strict=True))
        if method.schedule is not None:
            row["full_step_list"] = [*method.schedule.full_steps]
        if distances := self.judged.get(LPIPS):
            found = bootstrap(mean, distances)
            ends = [found["low"], found["high"]]
            row |= zip(LPIPS_COLUMNS, (found["value"], max(distances), ends), strict=True)
        if self.frames:
            video = fmean(self.frames), min(self.frames), fmean(self.temporal)
            row |= zip(VIDEO_COLUMNS, video, strict=True)
        if method.name.startswith(PAPER):
            row["psnr_u8wrap"] = fmean(self.u8wrap)
        if self.peak_bytes is not None:
            row["peak_bytes"] = self.peak_bytes
        if scores := self.scores(plain):
            row["scores"] = scores
        return row


def _relative_error(reference: list[Tensor], latents: list[Tensor]) -> Tensor:
    """RMS(x - x_ref) / RMS(x_ref) of each prompt after each step, [B, S]."""
    columns = [
        (ours.float() - base.float()).flatten(1).norm(dim=1) / base.float().flatten(1).norm(dim=1)
        for base, ours in zip(reference, latents, strict=True)
    ]
    return torch.stack(columns, 1).cpu()
