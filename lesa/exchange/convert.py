"""The paper authors' checkpoints as forecasters of the paper's form."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lesa.core.checks import whole
from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.exchange.release import Released, read_release
from lesa.forecasters.config_check import check_tables
from lesa.forecasters.lesa import LesaForecaster
from lesa.forecasters.paper import PaperForm

__all__ = ["MODELS", "Model", "convert", "full_steps_of", "model_of"]

RELEASE = "github.com/caipeiliang2004/LESA at 1f30861"


@dataclass(frozen=True)
class Model:
    """A pipeline of the release: what its predictor caches, and the noise levels of its sampler.

    Flow times t = 1 .. 0 become s t / (1 + (s - 1) t). Where `lengths` are given, log s goes
    straight from `shifts[0]` at the first number of image tokens to `shifts[1]` at the second one;
    else s is `shifts[0]`. `terminal` is the last level before 0 that the others are stretched to.
    """

    denoiser: str
    size: int  # pixels, of the release's scripts
    shifts: tuple[float, float] = (1.0, 1.0)
    lengths: tuple[int, int] | None = None
    terminal: float | None = None
    stages: tuple[float, float] = (0.9, 0.5)
    branches: tuple[str, ...] = ("cond",)
    tap: str = "hidden"

    def sigmas(self, steps: int, height: int, width: int) -> tuple[float, ...]:
        """The S + 1 noise levels of a run at this size in pixels."""
        shift = self.shifts[0]
        if self.lengths is not None:
            (low, high), tokens = self.lengths, (height // 16) * (width // 16)
            share = (tokens - low) / (high - low)
            shift = math.exp(self.shifts[0] + (self.shifts[1] - self.shifts[0]) * share)
        times = [1 - s / steps for s in range(steps)]
        levels = [shift * t / (1 + (shift - 1) * t) for t in times]
        if self.terminal is not None and levels[-1] < 1:
            scale = (1 - levels[-1]) / (1 - self.terminal)
            levels = [1 - (1 - level) / scale for level in levels]
        return (*levels, 0.0)


_QWEN: dict[str, Any] = {
    "denoiser": "QwenImageTransformer2DModel",
    "size": 1328,
    "stages": (0.9, 0.4),
    "branches": ("cond", "uncond"),
}
MODELS = {
    "flux-dev": Model("FluxTransformer2DModel", 1024, (0.5, 1.15), (256, 4096)),
    "flux-schnell": Model("FluxTransformer2DModel", 1024),
    "qwen-image": Model(**_QWEN, shifts=(0.5, 0.9), lengths=(256, 8192), terminal=0.02),
    "qwen-image-lightning": Model(**_QWEN, shifts=(3.0, 3.0)),
    "hunyuan-video": Model("HunyuanVideoTransformer3DModel", 480, (7.0, 7.0), tap="output"),
}


def convert(
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    interval: int | None = None,
    first_enhance: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> LesaForecaster:
    """The forecaster in a checkpoint of the release: form="paper", spline="edge", float32.

    Args:
        path: the file that the release's train.py wrote.
        model: one of `MODELS`; by default told from the layout, the steps and the file's name.
        interval: every how many steps one is full, N of the release; by default the file's name
            says it (predictor_flux_N7_E3.pt).
        first_enhance: how many steps at the start are full, E of the release.
        height: in pixels, of the runs whose noise levels are recorded; the release's by default.
        width: likewise.

    Raises: LesaError where the file is none of the release, its name does not say N and E and they
        are not given, or the model's layout is another one.
    """
    found = read_release(path)
    name = model_of(found, path) if model is None else model
    if name not in MODELS:
        raise LesaError(f"model={name!r}: unknown; choose from {', '.join(MODELS)}")
    kind = MODELS[name]
    if set(kind.branches) != set(found.branches):
        raise LesaError(
            f"model={name!r}: it has the branches {', '.join(kind.branches)}, the file "
            f"{', '.join(found.branches)}; choose another of {', '.join(MODELS)}"
        )
    full = full_steps_of(*_rule(path, interval, first_enhance), found.steps)
    sides = [whole(n, v or kind.size, 16) for n, v in (("height", height), ("width", width))]
    forecaster = _forecaster(found, kind, _origin(path, name, kind, sides))
    forecaster.recommend(
        Schedule.explicit(full, found.steps), kind.sigmas(found.steps, sides[0], sides[1])
    )
    check_tables(forecaster)
    return forecaster


def model_of(found: Released, path: str | os.PathLike[str]) -> str:
    """The pipeline that a checkpoint was most likely trained for: two branches are Qwen-Image, with
    8 steps its Lightning; "hunyuan" stands in the file's name; 4 steps are FLUX.1-schnell."""
    if len(found.branches) > 1:
        return "qwen-image-lightning" if found.steps == 8 else "qwen-image"
    if "hunyuan" in Path(path).name.lower():
        return "hunyuan-video"
    return "flux-schnell" if found.steps == 4 else "flux-dev"


def full_steps_of(interval: int, first_enhance: int, steps: int) -> tuple[int, ...]:
    """The full steps of the release's rule: the first E, then whenever N - 1 steps were counted as
    skipped since the last one; step 3 is full besides, and counted as skipped.

    Source: the release's predictor/utils/cal_type.py.
    """
    full, counted = [], 0
    for step in range(steps):
        if step < first_enhance or counted == interval - 1:
            full.append(step)
            counted = 0
            continue
        counted += 1
        if step == 3:
            full.append(step)
    return tuple(full)


def _rule(
    path: str | os.PathLike[str], interval: int | None, first_enhance: int | None
) -> tuple[int, int]:
    """N and E: as given, else of the file's name."""
    told = re.search(r"_N(\d{1,4})_E(\d{1,4})\b", Path(path).stem)
    if told is None and (interval is None or first_enhance is None):
        missing = "interval" if interval is None else "first-enhance"
        raise LesaError(
            f"{missing}=None: the name {Path(path).name!r} does not say it, as "
            "predictor_flux_N7_E3.pt does; give interval and first-enhance"
        )
    named = (int(told[1]), int(told[2])) if told else (0, 0)
    return (
        whole("interval", named[0] if interval is None else interval, 1),
        whole("first-enhance", named[1] if first_enhance is None else first_enhance, 1),
    )


def _origin(
    path: str | os.PathLike[str], name: str, kind: Model, sides: list[int]
) -> dict[str, Any]:
    sized = kind.lengths is not None  # the levels depend on the size
    return {
        "model_class": kind.denoiser,
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "noise": False,
        "call": {"height": sides[0], "width": sides[1]} if sized else {},
        "converted_from": Path(path).name,
        "converted_sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "converted_model": name,
        "release": RELEASE,
    }


def _forecaster(found: Released, kind: Model, metadata: Mapping[str, Any]) -> LesaForecaster:
    forecaster = LesaForecaster(
        "paper",
        metadata=metadata,
        num_steps=found.steps,
        stages=kind.stages,
        windows=found.windows,
        branches=kind.branches,
        spline="edge",
        nodes=found.hidden,
        intervals=found.intervals,
        tap=kind.tap,
    )
    net = forecaster.net
    assert isinstance(net, PaperForm)
    with torch.no_grad():
        for branch, gates in found.branches.items():
            net.b[branch].copy_(torch.tensor([gate.b for gate in gates]))
            for stage, gate in enumerate(gates):
                net.w[branch][stage].copy_(gate.w)  # type: ignore[index]
                layers = net.gates[branch][stage]  # type: ignore[index]
                for layer, (base, spline) in zip(layers, gate.layers, strict=True):
                    layer.base.copy_(base)
                    layer.spline.copy_(spline)
    return forecaster
