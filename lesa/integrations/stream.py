"""A table at work in another engine's loop.

An adapter knows how its engine tells a step and where the feature is. What is full, what enters the
ring and how a forecast is mixed is the same here as in `lesa.enable`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.engine.config import LesaConfig
from lesa.engine.fit_to_model import unguarded
from lesa.engine.mixer import Mixer
from lesa.engine.ring import Ring
from lesa.engine.step_table import StepTable
from lesa.engine.step_tables import StepTables
from lesa.errors import LesaError
from lesa.hooks.added_noise import adds_noise, is_multistep
from lesa.hooks.generation import Generation
from lesa.hooks.noise_levels import levels_problem, noise_levels
from lesa.hooks.pipeline_state import executed_steps, first_step, guidance_parts, order_of
from lesa.hooks.step_clock import Step

__all__ = ["Plan", "Stream", "hidden_config", "run_of"]


def hidden_config(engine: str, forecaster: object, options: Mapping[str, Any]) -> LesaConfig:
    """A configuration for an engine that keeps what the blocks return.

    Raises:
        LesaError: an option is invalid, or the forecaster was made for the output tap.
    """
    given = {} if forecaster is None else {"forecaster": forecaster}
    config = LesaConfig(**{**options, **given})
    if config.forecaster.tap == "output" or config.forecaster.uses_latent:
        raise LesaError(
            f"forecaster {config.forecaster.name!r}: it was made for the output tap, {engine} "
            "keeps what the blocks return; train one with tap='hidden'"
        )
    return replace(config, tap="hidden")


def run_of(scheduler: Any, pipe: Any = None) -> Generation:
    """The run that a diffusers scheduler is set to, as `lesa.enable` would see it.

    Args:
        scheduler: after its `set_timesteps`.
        pipe: the pipeline in whose call this is; tells of img2img and of batched guidance.
    """
    times = scheduler.timesteps
    first = first_step(pipe, scheduler, times)
    steps = executed_steps(pipe, scheduler, times, first, calling=pipe is not None)
    run = Generation(times, first=first, num_steps=steps, sampler=type(scheduler).__name__)
    run.parts = 1 if pipe is None else guidance_parts(pipe)
    run.noise, run.multistep = adds_noise(scheduler, {}), is_multistep(scheduler)
    run.sigmas = noise_levels(scheduler, first, steps) or ()
    run.levels_problem = levels_problem(scheduler, first, steps)
    if order_of(scheduler) > 1:
        run.problem = f"scheduler of order {order_of(scheduler)}"
    return run


class Plan:
    """What was asked for; begins the streams of a run.

    Args:
        config: as for `lesa.apply_lesa_cache`; a guard is left out, with a warning, since these
            loops do not change their list.

    Raises:
        LesaError: a guard was asked for.
    """

    def __init__(self, config: LesaConfig) -> None:
        self.config = unguarded(config)
        self._tables = StepTables(self.config)

    def schedule(self, run: Generation) -> Schedule:
        """Which steps of a run are full.

        Raises:
            LesaError: the run contradicts what was asked for, or its steps cannot be followed.
        """
        if run.problem is not None:
            raise LesaError(f"scheduler: {run.problem}; use another one, or run without lesa")
        self.config.check_run(run.num_steps, sigmas=run.sigmas)
        return self.config.bound_schedule(run.num_steps, run.sigmas)

    def check_model(self, name: str) -> None:
        """LesaError where the forecaster was trained for another class than diffusers' `name`."""
        trained: Any = self.config.forecaster
        if hasattr(trained, "check_model"):
            trained.check_model(name, tap=self.config.resolved_tap)

    def stream(self, run: Generation, branch: str = "cond", start: int = 0) -> Stream:
        """An empty stream for one guidance branch of a run, from step `start` on.

        Raises:
            LesaError: as `schedule`; also where there is no table for the run or the branch.
        """
        self.schedule(run)
        self.config.check_run(run.num_steps, branch, run.sigmas)
        step = Step(start, run.num_steps, run.sigmas, branch, True, None, run.parts, run)
        table = self._tables.of(step, run.parts * max(run.pictures, 1))
        if isinstance(table, str):
            raise LesaError(table)
        return Stream(table, start)


class Stream:
    """The features of one guidance branch of a run, from step `start` on.

    At each step ask `skips(step)`; then either `forecast(step)`, or run the model and `keep` what
    it gave. A step that was left out, or a feature of another shape, leaves a hole: no later step
    is skipped, and a new stream may begin there. The ring goes with the last skipped step.
    """

    def __init__(self, table: StepTable, start: int = 0) -> None:
        self._table, self._start = table, start
        self._ring: Ring | None = None
        self._mixer: Mixer | None = None

    @property
    def uses_latent(self) -> bool:
        """Whether forecasts weigh the current latent."""
        return self._table.uses_latent

    @property
    def state(self) -> Tensor | None:
        """The cached features [K, ...]."""
        return None if self._ring is None else self._ring.data

    def scheduled(self, step: int) -> bool:
        """Whether the table forecasts this step."""
        index = step - self._start
        return 0 <= index < len(self._table.rows) and self._table.rows[index] is not None

    def skips(self, step: int, latent: Tensor | None = None) -> bool:
        """Whether it can be forecast: the table says so, the features are there and the latent, if
        it is weighed, has their shape."""
        ring = self._ring
        if not self.scheduled(step) or ring is None:
            return False
        if ring.pushed != self._table.expected[step - self._start]:
            return False
        like = ring.features[0]
        return not self.uses_latent or (latent is not None and latent.shape == like.shape)

    def keep(self, step: int, feature: Tensor) -> None:
        """Take the feature of a full step, where a later step needs it."""
        index, table = step - self._start, self._table
        if not 0 <= index < len(table.rows) or not table.pushes[index]:
            return
        if self._ring is None and not table.expected[index]:
            self._ring = Ring(table.history, feature)
            self._mixer = Mixer(table, self._ring)
        if self._ring is None or not self._ring.matches(feature):
            return self.release()
        self._ring.push(feature)

    def forecast(self, step: int, latent: Tensor | None = None) -> Tensor:
        """The feature of a step that `skips`.

        Args:
            step: its index in the run.
            latent: what the model would get, in the feature's shape; for tables that weigh it.

        Raises:
            LesaError: it cannot be forecast.
        """
        ring, mixer, index = self._ring, self._mixer, step - self._start
        if not self.skips(step, latent) or ring is None or mixer is None:
            raise LesaError(f"step={step}: its history is not there; run the model at this step")
        like = ring.features[0]
        weighed = latent.to(like.dtype) if self.uses_latent and latent is not None else None
        feature = mixer(index, torch.empty_like(like), weighed)
        if self._table.pushes[index]:
            ring.push(feature)
        if index == self._table.last:
            self.release()
        return feature

    def release(self) -> None:
        """Let go of the features; no later step is skipped."""
        self._ring = self._mixer = None
