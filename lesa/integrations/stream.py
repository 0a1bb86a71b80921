"""A table at work in another engine's loop.

An adapter knows how its engine tells a step and where the feature is. What is full, what enters the
ring and how a forecast is mixed is the same here as in `lesa.enable`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.engine.config import LesaConfig
from lesa.engine.mixer import Mixer
from lesa.engine.ring import Ring
from lesa.engine.step_table import StepTable, StepTables
from lesa.errors import LesaError
from lesa.hooks.generation import Generation, Generations, Loop
from lesa.hooks.step_clock import Step

__all__ = ["Plan", "Stream", "run_of"]


def run_of(scheduler: object, pipe: object = None) -> Generation:
    """The run that a diffusers scheduler is set to, as `lesa.enable` would see it.

    Args:
        scheduler: after its `set_timesteps`.
        pipe: the pipeline in whose call this is; tells of img2img and of batched guidance.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    return Generations(()).begin(Loop(pipe, scheduler, timesteps, pipe is not None, {}, {}, None))


class Plan:
    """What was asked for; begins the streams of a run.

    Args:
        config: as for `lesa.apply_lesa_cache`.
    """

    def __init__(self, config: LesaConfig) -> None:
        self.config = config
        self._tables = StepTables(config)

    def schedule(self, run: Generation) -> Schedule:
        """Which steps of a run are full.

        Raises:
            LesaError: the run contradicts what was asked for, or its steps cannot be followed.
        """
        if run.problem is not None:
            raise LesaError(f"scheduler: {run.problem}; use another one, or run without lesa")
        self.config.check_run(run.num_steps, "cond#", run.sigmas)
        return self.config.bound_schedule(run.num_steps, run.sigmas)

    def stream(self, run: Generation, branch: str = "cond") -> Stream:
        """An empty stream for one guidance branch of a run.

        Raises:
            LesaError: as `schedule`; also where there is no table for the run or the branch.
        """
        self.schedule(run)
        self.config.check_run(run.num_steps, branch, run.sigmas)
        step = Step(0, run.num_steps, run.sigmas, branch, True, None, run.parts, run)
        table = self._tables.of(step, run.parts * max(run.pictures, 1))
        if isinstance(table, str):
            raise LesaError(table)
        return Stream(table)


class Stream:
    """The features of one guidance branch of a run, from its first step on.

    At each step ask `skips(step)`; then either `forecast(step)`, or run the model and `keep` what
    it gave. A step that was left out, or a feature of another shape, leaves a hole: the steps after
    it are not skipped. The ring goes with the last skipped step.
    """

    def __init__(self, table: StepTable) -> None:
        self.table = table
        self._ring: Ring | None = None
        self._mixer: Mixer | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the cached features."""
        return 0 if self._ring is None else self._ring.nbytes

    def scheduled(self, step: int) -> bool:
        """Whether the table forecasts this step."""
        return step < len(self.table.rows) and self.table.rows[step] is not None

    def skips(self, step: int) -> bool:
        """Whether it can be forecast: the table says so and the features are there."""
        ring = self._ring
        return self.scheduled(step) and (
            ring is not None and ring.pushed == self.table.expected[step]
        )

    def keep(self, step: int, feature: Tensor) -> None:
        """Take the feature of a full step, where a later step needs it."""
        if step >= len(self.table.rows) or not self.table.pushes[step]:
            return
        if self._ring is None and not self.table.expected[step]:
            self._ring = Ring(self.table.history, feature)
            self._mixer = Mixer(self.table, self._ring)
        if self._ring is None or not self._ring.matches(feature):
            return self.release()
        self._ring.push(feature)

    def forecast(self, step: int, latent: Tensor | None = None) -> Tensor:
        """The feature of a step that `skips`.

        Args:
            step: its index.
            latent: what the model would get, in the feature's shape; for tables that weigh it.

        Raises:
            LesaError: the history is not there, or the latent has another shape.
        """
        if not self.skips(step) or self._ring is None or self._mixer is None:
            raise LesaError(f"step={step}: its history is not there; run the model at this step")
        like = self._ring.features[0]
        if self.table.uses_latent and (latent is None or latent.shape != like.shape):
            found = None if latent is None else list(latent.shape)
            raise LesaError(
                f"latent={found}: the table weighs a latent of {list(like.shape)}; use a "
                "forecaster without it, as lesa.Prior()"
            )
        weighed = latent.to(like.dtype) if self.table.uses_latent and latent is not None else None
        feature = self._mixer(step, torch.empty_like(like), weighed)
        if self.table.pushes[step]:
            self._ring.push(feature)
        if step == self.table.last:
            self.release()
        return feature

    def release(self) -> None:
        """Let go of the features; no later step is skipped."""
        self._ring = self._mixer = None
