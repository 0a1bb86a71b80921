"""Fewer steps: the same model, no cache, a shorter run, with the pipeline's or a better solver."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch

from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.evaluation.method import Bench, Method, Use
from lesa.hooks.noise_levels import says_flow

# log(1 - sigma) must be finite: UniPC solves a linear system in it.
_LARGEST_FLOW_TIME = 1 - 1e-6


@dataclass(frozen=True)
class FewerSteps:
    """A shorter run: on the pipeline's default noise levels for that many steps, or on those that
    the plain run has at a list of steps.

    solver: a multistep solver of diffusers by class name; None is the pipeline's own sampler.
    """

    solver: str | None = None

    takes_lists = True

    def unfit(self, bench: Bench) -> str | None:
        """A multistep solver needs the noise levels of the pipeline's own sampler."""
        own = getattr(bench.pipe, "scheduler", None)
        return None if self.solver is None else _unsuited(own)

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """As many steps as wanted, or the steps of the list."""
        if searched is not None:
            schedule = searched.bind(bench.num_steps)
            applied = partial(sampler, solver=self.solver, steps=schedule.full_steps)
            return Method(name, bench.num_steps, None, schedule, "searched", applied=applied)
        if self.solver is None:
            return Method(name, wanted)
        return Method(name, wanted, applied=partial(sampler, solver=self.solver))


SOLVERS = {
    "fewer-steps": FewerSteps(),
    "fewer-steps-dpm++": FewerSteps("DPMSolverMultistepScheduler"),
    "fewer-steps-unipc": FewerSteps("UniPCMultistepScheduler"),
}


@contextmanager
def sampler(
    pipe: Any, solver: str | None = None, steps: Sequence[int] | None = None, **options: Any
) -> Iterator[Use]:
    """Another sampler on a pipeline for a while.

    The pipeline's own scheduler sets the noise levels, with its own shift and spacing; of these
    the ones at `steps` are kept (all without), and the end of the last step, sigma = 0, always.
    `solver` is the diffusers class that steps through them, with `options` for its config:
    DPM++ 2M (DPM-Solver++, arXiv 2211.01095), UniPC-2 (arXiv 2302.04867). The pipeline has its own
    scheduler back afterwards.

    Raises: LesaError if the scheduler is of another kind, or, at the call of the pipeline, if the
        run has fewer steps than `steps` names.
    """
    own = pipe.scheduler
    if (reason := _unsuited(own)) is not None:
        raise LesaError(f"scheduler: {type(own).__name__} cannot be stepped otherwise: {reason}")
    levels = copy(own)
    swapped = copy(own) if solver is None else _multistep(solver, own, options)
    restart = swapped.set_timesteps

    @wraps(own.set_timesteps)  # pipelines look for `sigmas` and `timesteps` in its signature
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        levels.set_timesteps(*args, **kwargs)
        kept = range(len(levels.timesteps)) if steps is None else steps
        if kept[-1] >= len(levels.timesteps):
            raise LesaError(
                f"full_steps: {kept[-1]} is beyond the run's {len(levels.timesteps)} steps; "
                "give a list for that many"
            )
        if solver is None:
            restart(*args, **kwargs)
        else:
            restart(len(kept))
        rows = torch.tensor([*kept, -1])
        swapped.timesteps = levels.timesteps[rows[:-1].to(levels.timesteps.device)]
        kept_sigmas = levels.sigmas[rows.to(levels.sigmas.device)]
        swapped.sigmas = kept_sigmas.to(swapped.sigmas.device)  # multistep solvers read the host's
        if solver is not None and says_flow(own):
            swapped.sigmas = swapped.sigmas.clamp(max=_LARGEST_FLOW_TIME)
        swapped.num_inference_steps = len(kept)

    swapped.set_timesteps = set_timesteps
    pipe.scheduler = swapped
    try:
        yield Use(cache_bytes=lambda: 0)
    finally:
        pipe.scheduler = own


def _multistep(solver: str, own: Any, options: dict[str, Any]) -> Any:
    """A multistep solver for the model that `own` samples; its noise levels are set from outside.

    FLUX drops its own noise levels where a scheduler's config says `use_flow_sigmas`, so the flow
    convention, x = (1 - sigma) x0 + sigma noise, is given to the instance instead.
    """
    import diffusers

    kind, flow = getattr(diffusers, solver), says_flow(own)
    known = set(inspect.signature(kind).parameters) - {"shift_terminal"}
    config = {name: value for name, value in own.config.items() if name in known}
    spacings = ("dynamic_shifting", "flow_sigmas", "karras_sigmas", "exponential_sigmas")
    config |= {f"use_{name}": False for name in (*spacings, "beta_sigmas")}
    if flow:
        config["prediction_type"] = "flow_prediction"
    found = kind(**config | options)
    if flow:
        found._sigma_to_alpha_sigma_t = lambda sigma: (1 - sigma, sigma)
    return found


def _unsuited(scheduler: Any) -> str | None:
    """Why other steps cannot be taken on the noise levels of a scheduler, or None."""
    if not hasattr(scheduler, "sigmas") or scheduler.order != 1:
        kind = type(scheduler).__name__
        return f"needs a scheduler with sigmas and one call per step, not {kind}; leave it out"
    return None
