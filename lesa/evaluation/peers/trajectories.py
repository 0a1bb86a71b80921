"""Plain runs of calibration prompts, for peers that choose their full steps from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lesa.errors import LesaError
from lesa.evaluation.method import Bench
from lesa.hooks.denoiser import Denoiser
from lesa.hooks.outputs import read_sample
from lesa.training.job import Job, call_arguments, followed

__all__ = ["Trajectory", "Trial", "job_of", "trajectories"]


@dataclass(frozen=True)
class Trajectory:
    """One plain run: noise levels (S + 1), outputs per guidance branch [S, N], latents [S + 1, M].

    Latents are empty where the pipeline's final ones have another size than the denoiser's.
    """

    sigmas: tuple[float, ...]
    outputs: dict[str, Tensor]
    latents: Tensor


class _Recorder:
    """Controller that runs every call in full and keeps what goes in and what comes out."""

    def __init__(self) -> None:
        self.sigmas: tuple[float, ...] = ()
        self.outputs: dict[str, list[Tensor]] = {}
        self.latents: list[Tensor] = []

    def __call__(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = followed(denoiser, kwargs)
        self.sigmas = step.sigmas
        output, latent = denoiser.run(args, kwargs).output, denoiser.latent(args, kwargs)
        sample = read_sample(output)
        if sample is None or not isinstance(latent, Tensor):
            raise LesaError(
                f"pipe: {denoiser.original_class.__name__} takes or returns no single tensor, so "
                "its runs cannot be compared step by step; leave this method out"
            )
        known = self.outputs.setdefault(step.branch, [])
        known.append(sample.detach().flatten().double())
        if len(self.latents) < len(known):
            self.latents.append(latent.detach().flatten().double())
        return output

    def trajectory(self, final: Tensor) -> Trajectory:
        """What was kept, with the latents that the run ended in."""
        ends = final.detach().flatten().to(self.latents[0])
        fits = ends.numel() == self.latents[0].numel()
        latents = torch.stack([*self.latents, ends]) if fits else torch.empty(0)
        outputs = {branch: torch.stack(known) for branch, known in self.outputs.items()}
        return Trajectory(self.sigmas, outputs, latents)


def job_of(bench: Bench) -> Job:
    """The bench's pipeline on its calibration prompts, every run ending in latents."""
    taken, _ = call_arguments(bench.pipe, dict(bench.settings))
    taken.pop("num_inference_steps", None)
    return Job(bench.pipe, bench.calibration, taken, "output", bench.seed)


def trajectories(bench: Bench, prompts: int) -> Iterator[Trajectory]:
    """The plain run of each of the first calibration prompts; one is in memory at a time."""
    job = job_of(bench)
    for row in range(min(prompts, len(bench.calibration))):
        recorder = _Recorder()
        with job.controlled(recorder):
            final = job.run([row], bench.num_steps)
        yield recorder.trajectory(final)


class Trial:
    """The final latents of the plain run of a few calibration prompts, which others are held
    against."""

    def __init__(self, bench: Bench, prompts: int) -> None:
        self._job, self._steps = job_of(bench), bench.num_steps
        self._rows: Sequence[int] = range(min(prompts, len(bench.calibration)))
        self._plain = self._job.run(self._rows, self._steps).double()

    def error(self, applied: Callable[[Any], AbstractContextManager[Any]]) -> float:
        """Mean squared error of the final latents under what `applied(pipe)` puts on the pipeline;
        infinite where they are not finite."""
        with applied(self._job.pipe):
            final = self._job.run(self._rows, self._steps).double()
        error = float((final - self._plain).square().mean())
        return error if error == error else float("inf")
