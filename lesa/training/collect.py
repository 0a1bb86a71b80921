"""Phase 1: run the plain pipeline on the calibration prompts and keep inner products only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lesa.errors import LesaError
from lesa.hooks import Denoiser, attach, detach, read_sample
from lesa.training.job import Job, followed
from lesa.training.statistics import Statistics, gram


@dataclass
class _Trajectory:
    features: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)


class Collector:
    """Controller that runs every step in full and keeps one batch's trajectory until ``reduce``."""

    def __init__(self, tap: str) -> None:
        self.tap = tap
        self.sigmas: tuple[float, ...] = ()
        self.branches: dict[str, _Trajectory] = {}
        self.peak_bytes = 0

    def __call__(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = followed(denoiser, kwargs)
        self.sigmas = step.sigmas
        output, feature, _ = denoiser.run(args, kwargs, tap=self.tap == "hidden")
        if self.tap == "output":
            feature = read_sample(output)
        if feature is None:
            raise LesaError(
                f"tap={self.tap!r}: {type(denoiser.model).__name__} has no single tensor there: "
                "choose the other tap"
            )
        latent = denoiser.latent(args, kwargs)
        branch = self.branches.setdefault(step.branch, _Trajectory())
        branch.features.append(feature.detach().flatten(1).clone())
        if self.tap == "output" and isinstance(latent, Tensor) and latent.shape == feature.shape:
            branch.latents.append(latent.detach().flatten(1).clone())
        return output

    def reduce(self) -> dict[str, tuple[Tensor, bool]]:
        """Gram matrices ``[B, M, M]`` of the batch per branch; forgets the batch.

        The flag tells whether latents are part of the basis.
        """
        kept = [part for t in self.branches.values() for part in (*t.features, *t.latents)]
        self.peak_bytes = max(self.peak_bytes, sum(part.nbytes for part in kept))
        result = {}
        for name, trajectory in self.branches.items():
            has_latent = len(trajectory.latents) == len(trajectory.features)
            parts = trajectory.features + (trajectory.latents if has_latent else [])
            parts = [*parts, torch.ones_like(parts[0])]
            grams = [
                gram(torch.stack([part[row] for part in parts])) for row in range(len(parts[0]))
            ]
            result[name] = torch.stack(grams), has_latent
        self.branches = {}
        return result


def collect(job: Job, num_inference_steps: int) -> Statistics:
    """Statistics of the base trajectories at one step count.

    With ``job.folder`` the file is rewritten after every batch, and an interrupted collection
    continues where it stopped. At most one batch's features are in memory. Raises LesaError when
    the folder holds statistics of other prompts or settings.
    """
    name = f"statistics-{num_inference_steps}.safetensors"
    path = None if job.folder is None else job.folder / name
    setting = job.fingerprint(num_inference_steps)
    found = _resumed(path, list(job.prompts), setting)
    collector, done = Collector(job.tap), 0 if found is None else len(found.prompts)
    attach(job.model, collector, job.pipe)
    try:
        with job.progress.bar(
            f"collect {num_inference_steps} steps", len(job.prompts), done
        ) as bar:
            while done < len(job.prompts):
                batch = list(job.prompts[done : done + job.batch_size])
                job.run(batch, job.generators(done, len(batch)), num_inference_steps)
                for branch, (grams, has_latent) in collector.reduce().items():
                    if found is None:
                        found = Statistics(collector.sigmas, job.tap, has_latent, setting=setting)
                    found.extend(branch, grams)
                assert found is not None
                found.prompts += batch
                if path is not None:
                    found.save(path)
                done += len(batch)
                bar(len(batch))
    finally:
        detach(job.model)
    assert found is not None
    size = f", file {path.stat().st_size / 1e6:.2f} MB" if path is not None else ""
    job.progress.line(
        f"collect: {done} prompts x {num_inference_steps} steps, "
        f"at most {collector.peak_bytes / 1e6:.1f} MB of features held{size}"
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
