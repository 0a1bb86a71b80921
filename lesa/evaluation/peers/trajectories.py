"""Plain runs of calibration prompts, for peers that choose their full steps from them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import wraps
from types import MethodType
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

    Outputs are the denoiser's, with batched guidance all parts of it. Latents are the sampler's,
    one per picture whatever the denoiser is given of it; empty where its step is not taken once
    for each of the denoiser's.
    """

    sigmas: tuple[float, ...]
    outputs: dict[str, Tensor]
    latents: Tensor


class _Recorder:
    """Controller that runs every call in full and keeps what comes out; `moved` is told what the
    sampler makes of it."""

    def __init__(self) -> None:
        self.sigmas: tuple[float, ...] = ()
        self.outputs: dict[str, list[Tensor]] = {}
        self.moves: list[tuple[Tensor | None, Tensor | None]] = []

    def __call__(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = followed(denoiser, kwargs)
        self.sigmas = step.sigmas
        output = denoiser.run(args, kwargs).output
        sample = read_sample(output)
        if sample is None:
            raise LesaError(
                f"pipe: {denoiser.original_class.__name__} returns no single tensor, so its runs "
                "cannot be compared step by step; leave this method out"
            )
        self.outputs.setdefault(step.branch, []).append(sample.detach().flatten().double())
        return output

    def moved(self, before: Any, after: Any) -> None:
        """A step of the sampler: the latent that it got, and the one that it made."""
        self.moves.append((_flat(before), _flat(after)))

    def trajectory(self) -> Trajectory:
        """What was kept."""
        outputs = {branch: torch.stack(known) for branch, known in self.outputs.items()}
        latents = [before for before, _ in self.moves] + [after for _, after in self.moves[-1:]]
        known = [latent for latent in latents if latent is not None]
        alike = len({latent.shape for latent in known}) == 1
        fits = alike and len(known) == len(latents) == len(self.sigmas)
        return Trajectory(self.sigmas, outputs, torch.stack(known) if fits else torch.empty(0))


def _flat(latent: Any) -> Tensor | None:
    return latent.detach().flatten().double() if isinstance(latent, Tensor) else None


@contextmanager
def _watched(scheduler: Any, moved: Callable[[Any, Any], None]) -> Iterator[None]:
    """Tell of every step of a scheduler for a while: the latent before and after it."""
    own, step = vars(scheduler).get("step"), scheduler.step

    @wraps(type(scheduler).step)  # pipelines read its signature
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not scheduler:  # a copy that the pipeline made
            return type(self).step(self, *args, **kwargs)
        made = step(*args, **kwargs)
        moved(inspect.signature(step).bind(*args, **kwargs).arguments.get("sample"), made[0])
        return made

    scheduler.step = MethodType(watched, scheduler)
    try:
        yield
    finally:
        del scheduler.step
        if own is not None:
            scheduler.step = own


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
        with job.controlled(recorder), _watched(bench.pipe.scheduler, recorder.moved):
            job.run([row], bench.num_steps)
        yield recorder.trajectory()


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
