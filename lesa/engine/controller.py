"""The engine: runs tables. Each call of the denoiser is full or skipped."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from time import perf_counter
from typing import Any, NamedTuple

import torch

from lesa.engine import nvtx_ranges
from lesa.engine.config import LesaConfig
from lesa.engine.graphs.step_graphs import StepGraphs
from lesa.engine.hidden_tap import HiddenTap
from lesa.engine.stats import Counters, Stats
from lesa.engine.step_table import StepTables
from lesa.engine.trajectory import FeatureTap, OutputTap, Refusal, Trajectory
from lesa.errors import LesaError, RunError
from lesa.hooks.attach import refuse_other_cache
from lesa.hooks.denoiser import Call, Denoiser

__all__ = ["CacheController"]

logger = logging.getLogger("lesa")


class _Decision(NamedTuple):
    """What becomes of a call: a forecast of `trajectory` if `skip`, else the whole model runs.

    `trajectory` is the one that keeps the feature then, if any, and `reason` says why the call is
    full though no schedule asked for it.
    """

    trajectory: Trajectory | None
    skip: bool = False
    reason: str | None = None


class _Own(threading.local):
    """A thread's trajectories by guidance branch."""

    def __init__(self) -> None:
        self.trajectories: dict[str, Trajectory] = {}


class CacheController:
    """Computes the scheduled steps in full and forecasts the others from a table.

    State belongs to one thread, generation and guidance branch. Whatever it does not understand
    is computed in full, with a counted reason. A disturbed generation (changed prompt, missing
    history) goes on with a table for its remaining steps. It raises on its own account at step 0
    only, a RunError, where the generation contradicts the configuration.
    """

    def __init__(self, config: LesaConfig) -> None:
        self.config = config
        self.counters = Counters(config.forecaster.name, config.resolved_tap)
        self._tables = StepTables(config)
        self._own = _Own()
        self._remade: set[str] = set()  # what pipelines make anew at every step
        self.tap = _tap(config)

    def stats(self) -> Stats:
        """What happened so far."""
        graphs = self.tap.graphs
        counts = {} if graphs is None else dict(graphs.counts)
        return replace(self.counters.snapshot(), graphs=counts)

    def reset(self) -> None:
        """Drop this thread's features."""
        self._own.trajectories = {}

    def __call__(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the model: forecast it, or run it."""
        begun = perf_counter()
        call, trajectory = None, None
        try:
            try:
                call = Call(
                    denoiser, denoiser.clock.tick(denoiser.named(args, kwargs)), args, kwargs
                )
                trajectory, skip, reason = self._decide(call)
                if skip:
                    assert trajectory is not None
                    output = trajectory.forecast(call)
                    self.counters.add_skipped(perf_counter() - begun)
                    return output
                if reason is not None:
                    self._fall_back(reason)
            except RunError:  # nothing has been computed yet
                raise
            except Exception as error:
                trajectory = self._recover(call, error)
            output = self._full(denoiser, args, kwargs, call, trajectory)
        except BaseException:  # of the model, an interrupt, a contradiction: this run is over
            denoiser.reset()
            raise
        self.counters.add_full(perf_counter() - begun)
        return output

    def _decide(self, call: Call) -> _Decision:
        """Full or skipped, from the schedule and from what is not as it was."""
        step = call.step
        if step.fresh:
            self._begin(call)
        trajectory = self._own.trajectories.get(step.branch)
        if torch.is_grad_enabled() or step.problem is not None:
            self._own.trajectories.pop(step.branch, None)
            return _Decision(None, reason=step.problem or "grad is enabled")
        if trajectory is None:
            return self._anew(call, "no history at a later step" if step.index else None)
        disturbance = trajectory.disturbance(call)
        if disturbance is not None:
            return self._anew(call, disturbance)
        return _Decision(trajectory, trajectory.skips(step))

    def _anew(self, call: Call, reason: str | None) -> _Decision:
        """Begin a trajectory with this call, or none where there is no table for it."""
        step = call.step
        self._own.trajectories.pop(step.branch, None)
        if step.index == 0:
            self.config.check_run(step.num_steps, step.branch, step.sigmas)
        table = self._tables.of(step, _rows(call))
        if isinstance(table, str):
            return _Decision(None, reason=table)  # no other reason would change that
        trajectory = self._own.trajectories[step.branch] = Trajectory(
            table, call, self.tap, self._remade
        )
        return _Decision(trajectory, reason=reason)

    def _recover(
        self, call: Call | None, error: Exception, *, computed: bool = False
    ) -> Trajectory | None:
        """Go on after a failure of the engine's own: the user's picture matters more.

        Args:
            call: the call, if its step is known.
            error: what went wrong; counted.
            computed: the model has run, only the history has a hole now.

        Returns:
            The trajectory that keeps the feature of this call, if any.
        """
        refused = isinstance(error, Refusal)
        reason = str(error) if refused else f"{type(error).__name__}: {error}"
        self._fall_back(reason)
        if call is None or not (refused or computed):
            self.reset()
        elif computed:
            self._own.trajectories.pop(call.step.branch, None)
        else:
            try:
                return self._anew(call, reason).trajectory
            except RunError:
                raise
            except Exception as another:
                return self._recover(None, another)
        return None

    def _full(
        self,
        denoiser: Denoiser,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: Call | None,
        trajectory: Trajectory | None,
    ) -> Any:
        """Run the model and let the trajectory, if there is one, keep its feature."""
        inside = trajectory is not None and self.tap.inside
        with nvtx_ranges.full:
            run = denoiser.run(args, kwargs, tap=inside)
        if call is None or trajectory is None:
            return run.output
        try:
            feature = trajectory.keep(call, run)
            if feature is not None:
                self.counters.watch(feature)
            if feature is not None and trajectory.ring and trajectory.ring.pushed == 1:
                rings = [each.ring for each in self._own.trajectories.values()]
                self.counters.set_ring_bytes(sum(ring.nbytes for ring in rings if ring))
        except Exception as error:
            self._recover(call, error, computed=True)
        return run.output

    def _begin(self, call: Call) -> None:
        """A generation begins: its schedule, and nothing of the one before."""
        step = call.step
        self.reset()
        pipe, names = call.denoiser.clock.caller()
        if pipe is not None:  # perhaps another one than was enabled, or with other parts since
            call.denoiser.watch(pipe, names)
        if step.index == 0:
            _check_caches(call)
        self.counters.add_generation()
        try:
            schedule, why = self.config.choice(step.num_steps, step.sigmas)
            self.counters.set_schedule(schedule.full_steps, step.num_steps, why)
        except LesaError:  # counted where the table is asked for
            self.counters.set_schedule((), step.num_steps)

    def _fall_back(self, reason: str) -> None:
        if self.counters.add_fallback(reason):
            logger.warning("computed in full: %s", reason)


def _tap(config: LesaConfig) -> FeatureTap:
    """The tap that is asked for, with CUDA graphs where they are wanted and may be had."""
    if config.resolved_tap == "output":
        return OutputTap()
    wanted = config.graph == "auto" and torch.cuda.is_available()
    return HiddenTap(StepGraphs() if wanted else None)


def _rows(call: Call) -> int:
    """Rows of the batch that a call gets."""
    latent = call.argument(call.denoiser.spec.latent)
    return len(latent) if isinstance(latent, (torch.Tensor, list, tuple)) else 0


def _check_caches(call: Call) -> None:
    """RunError if a cache of diffusers was put on the model after lesa."""
    try:
        refuse_other_cache(call.denoiser.model)
    except LesaError as error:
        raise RunError(str(error)) from None
