"""The engine: runs tables. Each call of the denoiser is full or skipped."""

from __future__ import annotations

import logging
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

from lesa.engine import nvtx_ranges
from lesa.engine.config import LesaConfig
from lesa.engine.graphs.step_graphs import StepGraphs
from lesa.engine.hidden_tap import HiddenTap
from lesa.engine.joint import BUSY, run_joint
from lesa.engine.kept import Decision, Kept
from lesa.engine.options import current_options
from lesa.engine.output_tap import OutputTap
from lesa.engine.plans import Plans
from lesa.engine.pool import Pool
from lesa.engine.stats import Counters, Stats
from lesa.engine.step_table import Guarded
from lesa.engine.trajectory import FeatureTap, Refusal, Trajectory
from lesa.errors import LesaError, RunError
from lesa.hooks.attach import refuse_other_cache
from lesa.hooks.batch_rows import rows_in
from lesa.hooks.denoiser import Call, Denoiser, Run
from lesa.hooks.request import Joint, Request

__all__ = ["CacheController"]

logger = logging.getLogger("lesa")


class CacheController:
    """Computes the scheduled steps in full and forecasts the others from a table.

    State belongs to one request, generation and guidance branch: it lies in the `Request` whose
    call this is, be that a thread's own or one of a `lesa.Slot`. Whatever it does not understand
    is computed in full, with a counted reason. A disturbed generation (changed prompt, missing
    history) goes on with a table for its remaining steps. It raises on its own account at step 0
    only, a RunError, where the generation contradicts the configuration.
    """

    def __init__(self, config: LesaConfig) -> None:
        self.config = config
        self.counters = Counters(config.forecaster.name, config.resolved_tap)
        self.plans = Plans(config, self.check_budget)
        self.pool = Pool(config.memory_limit)
        self._remade: set[str] = set()  # what pipelines make anew at every step
        self.tap = _tap(config)

    @staticmethod
    def check_budget(config: LesaConfig) -> None:
        """LesaError where a request's budget makes a configuration that does not serve the
        model."""

    def stats(self) -> Stats:
        """What happened so far."""
        graphs = self.tap.graphs
        counts = {} if graphs is None else dict(graphs.counts)
        pool = self.pool.state()._asdict()
        return replace(self.counters.snapshot(), graphs=counts, pool=pool)

    def __call__(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the model: forecast it, or run it."""
        request = denoiser.clock.requests.now()
        if isinstance(request, Joint):
            return run_joint(self, denoiser, request, args, kwargs)
        asked = request.options or current_options()
        if asked is not None and asked.off:
            self.counters.add_off()
            return denoiser.run(args, kwargs).output
        if request.turn is None:
            return self._serve(request, denoiser, args, kwargs)
        if not request.turn.acquire(blocking=False):
            begun = perf_counter()
            self.fall_back(BUSY)
            output = denoiser.run(args, kwargs).output
            self.counters.add_full(perf_counter() - begun)
            return output
        try:
            return self._serve(request, denoiser, args, kwargs)
        finally:
            request.turn.release()

    def _serve(
        self,
        request: Request,
        denoiser: Denoiser,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """One call in a request that nobody else is in."""
        begun = perf_counter()
        call, trajectory = None, None
        try:
            try:
                step = denoiser.clock.tick(denoiser.named(args, kwargs), request)
                call = Call(denoiser, step, args, kwargs, request)
                trajectory, skip, reason = self.decide(call)
                if skip:
                    assert trajectory is not None
                    output = trajectory.forecast(call)
                    self.counters.add_skipped(perf_counter() - begun)
                    return output
                if reason is not None:
                    self.fall_back(reason)
            except RunError:  # nothing has been computed yet
                raise
            except Exception as error:
                if call is None:
                    request.kept = None
                trajectory = self.recover(call, error)
            output = self._full(denoiser, args, kwargs, call, trajectory)
        except BaseException:  # of the model, an interrupt, a contradiction: this run is over
            denoiser.reset()
            raise
        self.counters.add_full(perf_counter() - begun)
        return output

    def decide(self, call: Call) -> Decision:
        """Full or skipped, from the schedule and from what is not as it was."""
        step = call.step
        if step.fresh or call.request.kept is None:
            self._begin(call)
        trajectories = call.request.kept.trajectories
        trajectory = trajectories.get(step.branch)
        if torch.is_grad_enabled() or step.problem is not None:
            trajectories.pop(step.branch, None)
            return Decision(None, reason=step.problem or "grad is enabled")
        if trajectory is None:
            return self._anew(call, "no history at a later step" if step.index else None)
        disturbance = trajectory.disturbance(call)
        if disturbance is not None:
            return self._anew(call, disturbance)
        return Decision(trajectory, trajectory.skips(step))

    def _anew(self, call: Call, reason: str | None) -> Decision:
        """Begin a trajectory with this call, or none where there is no table for it."""
        step, kept = call.step, call.request.kept
        kept.trajectories.pop(step.branch, None)
        if step.index == 0:
            kept.plan.check_run(step)
        rows = rows_in(call.argument(call.denoiser.spec.latent))
        table = kept.problem or kept.plan.tables.of(step, rows, at_risk=bool(kept.at_risk))
        if isinstance(table, str):
            return Decision(None, reason=table)  # no other reason would change that
        trajectory = kept.trajectories[step.branch] = Trajectory(
            table, call, self.tap, self.pool, self._remade
        )
        return Decision(trajectory, reason=reason)

    def recover(
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
        self.fall_back(reason)
        kept = None if call is None else call.request.kept
        if call is None or kept is None:
            return None
        if not (refused or computed):
            kept.trajectories.clear()
        elif computed:
            kept.trajectories.pop(call.step.branch, None)
        else:
            try:
                return self._anew(call, reason).trajectory
            except RunError:
                raise
            except Exception as another:
                kept.trajectories.clear()
                return self.recover(None, another)
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
        if call is not None and trajectory is not None:
            self.keep(call, trajectory, run)
        return run.output

    def keep(self, call: Call, trajectory: Trajectory, run: Run) -> None:
        """Let a trajectory keep the feature of a full step."""
        try:
            feature = trajectory.keep(call, run)
            if feature is not None:
                self.counters.watch(feature)
            if feature is not None and trajectory.ring and trajectory.ring.pushed == 1:
                self.counters.set_ring_bytes(call.request.kept.nbytes)
            if trajectory.guarded is not None:
                self._guard(call, trajectory, run, trajectory.guarded)
        except Exception as error:
            self.recover(call, error, computed=True)

    def _guard(self, call: Call, trajectory: Trajectory, run: Run, guarded: Guarded) -> None:
        """Look whether a picture is at risk, where this is the step for it; the first branch that
        is called decides for all."""
        guard, kept = guarded.guard, call.request.kept
        if call.step.index != guard.step:
            return
        if kept.at_risk is None:
            risk = trajectory.risk
            if risk is None:
                return
            kept.at_risk = not risk <= guard.limit  # also where it is no number
            self.counters.set_risk(kept.generation, risk)
            if kept.at_risk:
                steps = guard.schedule.full_steps
                self.counters.add_guarded(kept.generation, steps, guarded.extra)
        if kept.at_risk:
            trajectory.act(call, run)

    def _begin(self, call: Call) -> None:
        """A generation begins: its budget, its schedule, and nothing of the one before."""
        step, request = call.step, call.request
        request.kept = Kept(self.plans.default, self.counters.add_generation())
        pipe, names = call.denoiser.clock.caller(request)
        if pipe is not None:  # perhaps another one than was enabled, or with other parts since
            call.denoiser.controls.watch(pipe, names)
        if step.index == 0:
            _check_caches(call)
        try:
            request.kept.plan = plan = self.plans.of(request.options or current_options())
        except LesaError as error:
            if step.index == 0:
                raise RunError(str(error)) from None
            request.kept.problem = str(error)
            return
        try:
            schedule, why = plan.config.choice(step.num_steps, step.sigmas)
            self.counters.set_schedule(schedule.full_steps, step.num_steps, why)
        except LesaError:  # counted where the table is asked for
            self.counters.set_schedule((), step.num_steps)

    def fall_back(self, reason: str) -> None:
        """Count why a call is computed in full; a new reason is logged."""
        if self.counters.add_fallback(reason):
            logger.warning("computed in full: %s", reason)


def _tap(config: LesaConfig) -> FeatureTap:
    """The tap that is asked for, with CUDA graphs where they are wanted and may be had."""
    if config.resolved_tap == "output":
        return OutputTap()
    wanted = config.graph == "auto" and torch.cuda.is_available()
    return HiddenTap(StepGraphs() if wanted else None)


def _check_caches(call: Call) -> None:
    """RunError if a cache of diffusers was put on the model after lesa."""
    try:
        refuse_other_cache(call.denoiser.model)
    except LesaError as error:
        raise RunError(str(error)) from None
