"""Phase 1: run the plain pipeline on the calibration prompts and keep inner products only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lesa.api import find_denoiser
from lesa.clock import Step
from lesa.errors import LesaError
from lesa.hooks import Denoiser, attach, detach, read_sample
from lesa.training.progress import Progress
from lesa.training.statistics import Statistics, gram


@dataclass
class _Trajectory:
    features: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)


class Collector:
    """Controller that runs every step in full and keeps one batch's features and latents until
    ``reduce``."""

    def __init__(self, tap: str) -> None:
        self.tap = tap
        self.sigmas: tuple[float, ...] = ()
        self.branches: dict[str, _Trajectory] = {}
        self.peak_bytes = 0

    def __call__(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = followed(denoiser, kwargs)
        self.sigmas = step.sigmas
        output, hidden = denoiser.run(args, kwargs, tap=self.tap == "hidden")
        feature = hidden if self.tap == "hidden" else read_sample(output)
        if feature is None:
            raise LesaError(
                f"tap={self.tap!r}: {type(denoiser.model).__name__} has no single tensor there: "
                "choose the other tap"
            )
        latent = denoiser.latent(args, kwargs)
        branch = self.branches.setdefault(step.branch, _Trajectory())
        branch.features.append(feature.detach().flatten(1).clone())
        if latent is not None and self.tap == "output" and latent.shape == feature.shape:
            branch.latents.append(latent.detach().flatten(1).clone())
        return output

    def reduce(self) -> dict[str, tuple[Tensor, bool]]:
        """Gram matrices ``[B, M, M]`` of the batch per branch, and whether latents are part of
        the basis; forgets the batch."""
        result = {}
        held = sum(
            t.nbytes
            for branch in self.branches.values()
            for t in (*branch.features, *branch.latents)
        )
        self.peak_bytes = max(self.peak_bytes, held)
        for name, trajectory in self.branches.items():
            has_latent = len(trajectory.latents) == len(trajectory.features)
            parts = trajectory.features + (trajectory.latents if has_latent else [])
            rows = [torch.stack([part[row] for part in parts]) for row in range(len(parts[0]))]
            result[name] = (
                torch.stack([gram(torch.cat([r, torch.ones_like(r[:1])])) for r in rows]),
                has_latent,
            )
        self.branches = {}
        return result


def followed(denoiser: Denoiser, kwargs: dict[str, Any]) -> Step:
    """The step of a training run's call; LesaError where the clock cannot be sure of it."""
    step = denoiser.clock.tick(kwargs)
    if step.problem is not None:
        raise LesaError(
            f"step {step.index} of this pipeline cannot be followed ({step.problem}): train with "
            "a first-order scheduler and the pipeline's own loop"
        )
    return step


def fingerprint(**fields: Any) -> str:
    """Short hash of call arguments, to know whether statistics may be continued."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=repr).encode()).hexdigest()[
        :16
    ]


def generators(count: int, seed: int, start: int = 0) -> list[torch.Generator]:
    """One CPU generator per prompt, so that a prompt's noise does not depend on the batch it runs
    in."""
    return [torch.Generator().manual_seed(seed + start + row) for row in range(count)]


def collect(
    pipe: Any,
    prompts: Sequence[str],
    num_inference_steps: int,
    *,
    tap: str = "output",
    batch_size: int = 8,
    seed: int = 0,
    call: dict[str, Any] | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of the base trajectories of ``prompts`` at one step count.

    ``call`` holds further arguments of ``pipe(...)``. With ``folder`` the file is rewritten after
    every batch and an interrupted collection continues where it stopped. At most one batch's
    features are in memory.
    """
    progress = progress or Progress(quiet=True)
    model = find_denoiser(pipe)
    setting = fingerprint(
        tap=tap, steps=num_inference_steps, seed=seed, call=call or {}, model=type(model).__name__
    )
    path = None if folder is None else folder / f"statistics-{num_inference_steps}.safetensors"
    found = _resumed(path, list(prompts), setting)
    collector, done = Collector(tap), 0 if found is None else len(found.prompts)
    attach(model, collector, pipe)
    try:
        with progress.bar(f"collect {num_inference_steps} steps", len(prompts), done) as advance:
            while done < len(prompts):
                batch = list(prompts[done : done + batch_size])
                pipe(
                    batch,
                    num_inference_steps=num_inference_steps,
                    generator=generators(len(batch), seed, done),
                    **{"output_type": "latent", **(call or {})},
                )
                for branch, (grams, has_latent) in collector.reduce().items():
                    found = found or Statistics(collector.sigmas, tap, has_latent, setting=setting)
                    found.extend(branch, grams)
                assert found is not None
                found.prompts += batch
                size = 0 if path is None else found.save(path)
                done += len(batch)
                advance(len(batch))
    finally:
        detach(model)
    assert found is not None
    progress.line(
        f"collect: {done} prompts x {num_inference_steps} steps, at most {collector.peak_bytes / 1e6:.1f} MB of features held"
        + (f", file {size / 1e6:.2f} MB" if path is not None and collector.peak_bytes else "")
    )
    return found


def _resumed(path: Path | None, prompts: list[str], setting: str) -> Statistics | None:
    if path is None or not path.exists():
        return None
    found = Statistics.load(path)
    if found.setting != setting or found.prompts != prompts[: len(found.prompts)]:
        raise LesaError(
            f"statistics file {path} was collected with other prompts or settings: delete it or "
            "choose another folder"
        )
    return found
