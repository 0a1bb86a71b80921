"""Per step list: search the full steps, fit the closed loop, search again by accelerated runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.forecasters import LesaForecaster
from lesa.training.closed_loop import run_rollouts, steps_computed
from lesa.training.job import Job
from lesa.training.joint_fit import joint_fit, joint_steps
from lesa.training.rollout import Rollout, RolloutSpec, quality
from lesa.training.search import STARTS, OpenLoop, Steps, even, neighbours, search_schedule
from lesa.training.statistics import Statistics

DRIFTS = (0.3, 1.0)  # values of beta that compete: which is best depends on the step list
GENTLE = (0.0, 0.5)  # where the sampler is known in part, steering may do harm
SHRINKAGES = (0.0, 0.4)  # that compete as well
EXACT = 0.01  # relative RMS misfit of a sampler that is known but for rounding
CANDIDATES = 4  # neighbours of each leader that a round of refinement runs


class Calibrator:
    """Finds and fits step lists of one step count for a forecaster."""

    def __init__(self, job: Job, forecaster: LesaForecaster, statistics: Statistics) -> None:
        self.job, self.forecaster, self.statistics = job, forecaster, statistics
        self.judge = OpenLoop(statistics, forecaster.settings.history)
        self.base: Tensor | None = None  # final latents of the plain run, once rollouts have run

    def search(self, counts: Sequence[int]) -> list[Schedule]:
        """The best step list on the statistics for each number of full steps."""
        with self.job.progress.bar("schedule search", STARTS * len(counts)) as bar:
            bar.detail = f"{len(counts)} counts on the statistics, {self._steps} steps"
            return [
                search_schedule(self.statistics, count, judge=self.judge, advance=bar.advance)
                for count in counts
            ]

    def fit(
        self, plans: Sequence[Schedule], shrinkages: Sequence[float] = SHRINKAGES
    ) -> list[Rollout]:
        """The best rollout of each step list over the strengths of steering and shrinkage."""
        history, latent = self.forecaster.settings.history, self.forecaster.uses_latent
        pairs = list(product(self._drifts(), shrinkages))
        rollouts = [
            Rollout(RolloutSpec(plan, history, latent, drift, shrinkage=shrinkage))
            for plan in plans
            for drift, shrinkage in pairs
        ]
        with self.job.phase("fit on accelerated runs", self._rows(rollouts)) as bar:
            self._run(rollouts)
            bar.detail = f"{len(plans)} step lists x {len(pairs)} settings, {self._steps} steps"
        return [
            max((x for x in rollouts if x.spec.schedule == plan), key=quality) for plan in plans
        ]

    def refine(self, leaders: Sequence[Rollout], rounds: int) -> list[Rollout]:
        """Local search by true accelerated runs: the likeliest neighbours race their leader, and
        at first even lists: statistics say little of long gaps, and of two guidance branches."""
        best = list(leaders)
        if not rounds:
            return best
        tried = {leader.spec.schedule.full_steps for leader in leaders}
        expected = self._rows(CANDIDATES * best)  # of a round: who races is not yet known
        with self.job.phase("search by accelerated runs", rounds * expected) as bar:
            bar.detail = f"{rounds} rounds, {self._steps} steps"
            for turn in range(rounds):
                groups = [self._rivals(leader, tried, with_even=turn == 0) for leader in best]
                racing = [rollout for group in groups for rollout in group]
                bar.extend(self._rows(racing) - expected)
                self._run(racing)
                best = [
                    max([leader, *group], key=quality)
                    for leader, group in zip(best, groups, strict=True)
                ]
        return best

    def _rivals(self, leader: Rollout, tried: set[Steps], with_even: bool) -> list[Rollout]:
        """Rollouts of step lists that nobody has tried, which are then tried."""
        schedule = leader.spec.schedule
        near = neighbours(schedule.full_steps, self.statistics.num_steps, reach=2)
        fresh = sorted((steps for steps in near if steps not in tried), key=self.judge.quality)
        chosen = fresh[-CANDIDATES:]
        if with_even:
            chosen += even(len(schedule.full_steps), schedule.steps)
            chosen = [steps for steps in dict.fromkeys(chosen) if steps not in tried]
        tried.update(chosen)
        return [Rollout(replace(leader.spec, schedule=self._plan(steps))) for steps in chosen]

    def joint_fit(self, leaders: Sequence[Rollout], rounds: int) -> list[Rollout]:
        """All gaps of each rollout fitted together, on the final latents."""
        if not rounds:
            return [*leaders]
        sigmas = self.statistics.sigmas
        work = sum(joint_steps(self.job, leader, sigmas, rounds, self.base) for leader in leaders)
        with self.job.phase("fit on final latents", work * self.job.work.width) as bar:
            bar.detail = f"{len(leaders)} step lists, {rounds} rounds, {self._steps} steps"
            return [joint_fit(self.job, leader, sigmas, rounds, self.base) for leader in leaders]

    def store(self, rollouts: Sequence[Rollout]) -> None:
        """Put each rollout's coefficients into the forecaster and say how good they are."""
        for rollout in rollouts:
            spec, result = rollout.spec, rollout.result
            assert result.score is not None
            for branch, rows in result.coefficients.items():
                shared = result.shared.get(branch)
                known = (rows, None) if shared is None else (shared, rows)
                self.forecaster.correct(spec.schedule, self.statistics.sigmas, branch, *known)
            full = ", ".join(map(str, spec.schedule.full_steps))
            self.job.progress.line(
                f"fitted: {len(spec.schedule.full_steps)} of {spec.schedule.steps} steps in full "
                f"({full}): final latents {result.score.mean():.1f} dB mean, "
                f"{result.score.quantile(0.1):.1f} dB p10 above their error against the plain run"
            )

    def _run(self, rollouts: Sequence[Rollout]) -> None:
        if rollouts:
            self.base = run_rollouts(self.job, rollouts, self._prior, self._steps, self.statistics)

    def _drifts(self) -> tuple[float, ...]:
        """Values of beta to try; only 0 where nothing is known of the sampler."""
        sampler = self.statistics.sampler
        if sampler is None or not sampler.trusted:
            return (0.0,)
        return DRIFTS if sampler.misfit < EXACT else GENTLE

    def _prior(self, plan: Schedule, sigmas: tuple[float, ...], branch: str) -> Tensor:
        with torch.no_grad():
            rows = self.forecaster.net.rows(plan, sigmas, self.forecaster.branch(branch))[0]
        return rows.cpu()

    def _plan(self, full_steps: tuple[int, ...]) -> Schedule:
        return Schedule.explicit(full_steps, self._steps)

    @property
    def _steps(self) -> int:
        return self.statistics.num_steps

    def _rows(self, rollouts: Sequence[Rollout]) -> int:
        """Rows of the denoiser that `_run` computes for these."""
        base = 0 if self.job.kept_base(self._steps) else self._steps
        return self.job.rows(steps_computed(rollouts, base)) if rollouts else 0
