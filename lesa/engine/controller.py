"""The engine: runs tables. Each call of the denoiser is full or skipped."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

from lesa.engine import nvtx_ranges
from lesa.engine.call import Call, Refusal
from lesa.engine.config import LesaConfig
from lesa.engine.graphs.step_graphs import StepGraphs
from lesa.engine.graphs.tail_graph import TailBuffers
from lesa.engine.stats import Counters, Stats
from lesa.engine.step_table import StepTables
from lesa.engine.tail import ModulatedTail
from lesa.engine.trajectory import Trajectory
from lesa.errors import LesaError, RunError
from lesa.hooks.attach import refuse_other_cache
from lesa.hooks.denoiser import Denoiser

__all__ = ["CacheController"]

logger = logging.getLogger("lesa")


class CacheController:
    """Computes the scheduled steps in full and forecasts the others from a table.

    State belongs to one thread, generation and guidance branch. Whatever it does not understand
    is computed in full, with a counted reason. A disturbed generation (changed prompt, missing
    history) goes on with a table for its remaining steps. It raises on its own account at step 0
    only, a RunError, where the generation contradicts the configuration.
    """

    def __init__(self, config: LesaConfig) -> None:
        self.config = config
        self.tap = config.resolved_tap
        self.counters = Counters(config.forecaster.name, self.tap)
        self._tables = StepTables(config)
        self._local = threading.local()
        wanted = config.graph == "auto" and torch.cuda.is_available()
        self.graphs: StepGraphs[TailBuffers] | None = StepGraphs() if wanted else None
        self._found: ModulatedTail | None = None
        self._searched = False

    def stats(self) -> Stats:
        """What happened so far."""
        counts = {} if self.graphs is None else dict(self.graphs.counts)
        return replace(self.counters.snapshot(), graphs=counts)

    def reset(self) -> None:
        """Drop this thread's features."""
        self._local.trajectories = {}

    def __call__(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the model: forecast it, or run it."""
        begun = perf_counter()
        call, trajectory = None, None
        try:
            call = Call(denoiser, denoiser.clock.tick(kwargs), args, kwargs)
            trajectory = self._trajectory(call)
            if trajectory is not None and trajectory.skips(call.step):
                try:
                    output = trajectory.forecast(call, self.tap)
                    self.counters.add_skipped(perf_counter() - begun)
                    return output
                except Refusal as refusal:
                    trajectory = self._restart(call, str(refusal))
        except RunError:  # nothing has been computed yet
            denoiser.reset()
            raise
        except Exception as error:  # the user's picture matters more
            self._fall_back(f"{type(error).__name__}: {error}")
            self.reset()
            trajectory = None
        except BaseException:  # an interrupt
            denoiser.reset()
            raise
        output = self._full(denoiser, args, kwargs, call, trajectory)
        self.counters.add_full(perf_counter() - begun)
        return output

    def _full(
        self,
        denoiser: Denoiser,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: Call | None,
        trajectory: Trajectory | None,
    ) -> Any:
        """Run the model and keep its feature."""
        wanted = trajectory is not None and self.tap == "hidden"
        try:
            with nvtx_ranges.full:
                run = denoiser.run(args, kwargs, tap=wanted)
        except BaseException:
            denoiser.reset()
            raise
        if call is None or trajectory is None:
            return run.output
        try:
            if trajectory.keep(call, run, self.tap):
                rings = [t.ring for t in self._trajectories().values()]
                self.counters.set_ring_bytes(sum(ring.nbytes for ring in rings if ring))
        except Exception as error:  # as above; without this feature the history has a hole
            self._fall_back(_reason(error))
            self._trajectories().pop(call.step.branch, None)
        return run.output

    def _trajectory(self, call: Call) -> Trajectory | None:
        """The trajectory of this call, begun anew where its features are of no use."""
        step = call.step
        if step.fresh:
            self._begin(call)
        if torch.is_grad_enabled() or step.problem is not None:
            self._fall_back(step.problem or "grad is enabled")
            self._trajectories().pop(step.branch, None)
            return None
        trajectory = self._trajectories().get(step.branch)
        if trajectory is None:
            return self._restart(call, "no history at a later step" if step.index else None)
        disturbance = trajectory.disturbance(call)
        return trajectory if disturbance is None else self._restart(call, disturbance)

    def _begin(self, call: Call) -> None:
        step = call.step
        self.reset()
        if step.index == 0:
            _check_caches(call)
        self.counters.add_generation()
        try:
            self.counters.set_schedule(self._tables.schedule(step).full_steps, step.num_steps)
        except LesaError:  # counted where the plan is asked for
            self.counters.set_schedule((), step.num_steps)

    def _restart(self, call: Call, reason: str | None) -> Trajectory | None:
        """A trajectory that begins with this call, or None where there is no table for it."""
        if reason is not None:
            self._fall_back(reason)
        trajectories = self._trajectories()
        trajectories.pop(call.step.branch, None)
        if call.step.index == 0:
            self.config.check_run(call.step.num_steps, call.step.branch)
        plan = self._tables.of(call.step)
        if isinstance(plan, str):
            if reason is None:
                self._fall_back(plan)
            return None
        trajectory = trajectories[call.step.branch] = Trajectory(plan, call, self._tail(call))
        return trajectory

    def _tail(self, call: Call) -> ModulatedTail | None:
        """The tail whose modulation is computed ahead, found once."""
        if self.tap == "hidden" and not self._searched:
            self._found, self._searched = ModulatedTail.of(call.denoiser, self.graphs), True
        return self._found

    def _trajectories(self) -> dict[str, Trajectory]:
        if not hasattr(self._local, "trajectories"):
            self.reset()
        return self._local.trajectories

    def _fall_back(self, reason: str) -> None:
        if self.counters.add_fallback(reason):
            logger.warning("computed in full: %s", reason)


def _check_caches(call: Call) -> None:
    """RunError if a cache of diffusers was put on the model after lesa."""
    try:
        refuse_other_cache(call.denoiser.model)
    except LesaError as error:
        raise RunError(str(error)) from None


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
