"""Per number of full steps: find the step list, fit its rows in the closed loop, then all gaps
together; as much of each as a budget pays for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.forecasters import LesaForecaster
from lesa.forecasters.guard import Guard
from lesa.forecasters.worth import Worth
from lesa.training.closed_loop import run_rollouts, steps_computed
from lesa.training.job import Job
from lesa.training.joint_fit import joint_fit
from lesa.training.objective import quality
from lesa.training.rollout import Rollout, RolloutSpec
from lesa.training.search import (
    OpenLoop,
    Steps,
    candidates,
    first_gap,
    handicap,
    judge_of,
)
from lesa.training.statistics import Statistics

DRIFTS = (1.0, 0.5)  # values of beta that compete: which is best depends on the step list
GENTLE = (0.5, 0.0)  # where the sampler is known in part, steering more does harm
SHRINKAGES = (0.5, 0.0)  # that compete as well
EXACT = 0.01  # relative RMS misfit of a sampler that is known but for rounding
RACERS, FINALISTS = 12, 4  # lists: in the first race, and in the second
MANY = 32  # prompts, among which some may become another picture
FEWEST, DECISIVE = 4, 6  # prompts in a race, and where first gaps of all lengths meet


class Calibrator:
    """Finds and fits step lists of one step count for a forecaster.

    Budgets are full steps of a prompt.
    """

    def __init__(self, job: Job, forecaster: LesaForecaster, statistics: Statistics) -> None:
        self.job, self.forecaster, self.statistics = job, forecaster, statistics
        self.judge = judge_of(statistics, forecaster.settings.history)
        self.plain = OpenLoop(statistics, forecaster.settings.history)

    def search(self, counts: Sequence[int]) -> list[list[Steps]]:
        """Step lists for each number of full steps, as `candidates` orders them."""
        with self.job.progress.bar("schedule search", len(counts)) as bar:
            bar.detail = f"{len(counts)} counts on the statistics, {self._steps} steps"
            found = []
            for count in counts:
                found.append(candidates(self.judge, count))
                bar.advance()
            return found

    def race(self, lists: Sequence[Steps], budget: float) -> list[Steps]:
        """The best lists as true accelerated runs show them, the best first.

        Many run on few prompts; then the best one of each length of the first gap, and the next
        best, on as many as are paid for. The few decide badly between those lengths: where these
        are not `DECISIVE` prompts, lists with an early second full step race alone if there are
        enough of them.
        """
        prompts = min(len(self.job.prompts), budget / 2 / (FINALISTS * len(lists[0])))
        early = [steps for steps in lists if not first_gap(steps, self._steps)]
        alone = prompts < DECISIVE and len(early) >= FINALISTS
        lists = (early if alone else [*lists])[:RACERS]
        leaders = self._ranked(lists, budget / 2)
        if leaders is None:
            return lists
        gaps = [first_gap(steps, self._steps) for steps in leaders]
        firsts = [leaders[gaps.index(gap)] for gap in sorted({*gaps})]
        finalists = [*dict.fromkeys([*firsts, *leaders])][:FINALISTS]
        return self._ranked(finalists, budget / 2) or leaders

    def _ranked(self, lists: Sequence[Steps], budget: float) -> list[Steps] | None:
        """As many of the lists as the budget pays for on `FEWEST` prompts or more, in the order in
        which they end; None where that is one."""
        rollouts = [self._rollout(self._plan(steps)) for steps in lists]
        while rollouts and steps_computed(rollouts) * FEWEST > budget:
            rollouts.pop()
        if len(rollouts) < 2:
            return None
        lists, each = lists[: len(rollouts)], steps_computed(rollouts)
        prompts = self.job.mixed(min(len(self.job.prompts), int(budget / each)))
        with self.job.phase("race of step lists", self.job.rows(each, len(prompts))) as bar:
            bar.detail = f"{len(lists)} lists on {len(prompts)} prompts, {self._steps} steps"
            self._run(rollouts, prompts)
        late = (handicap(steps, self._steps) for steps in lists)
        ahead = [quality(rollout) - dB for rollout, dB in zip(rollouts, late, strict=True)]
        return [lists[i] for i in sorted(range(len(lists)), key=lambda i: -ahead[i])]

    def fit(self, lists: Sequence[Steps], budget: float) -> Rollout:
        """The best rollout on all prompts over the first lists and strengths of steering and
        shrinkage, as many as the budget pays for."""
        settings = [*product(self._drifts(), SHRINKAGES)]
        order = sorted(product(range(len(lists)), range(len(settings))), key=lambda ij: sum(ij))
        each = len(lists[0]) * len(self.job.prompts)
        count = max(1, int(min(len(order), budget / each)))
        rollouts = [self._rollout(self._plan(lists[i]), *settings[j]) for i, j in order[:count]]
        work = self.job.rows(steps_computed(rollouts))
        with self.job.phase("fit on accelerated runs", work) as bar:
            self._run(rollouts)
            bar.detail = f"{len(rollouts)} step lists and settings, {self._steps} steps"
        return max(rollouts, key=quality)

    def insured(self, leader: Rollout, lists: Sequence[Steps], budget: float) -> Rollout:
        """The leader, or the first list with an early second full step where the leader's is not
        and all prompts together, of which races run on a part, put that one ahead; if the budget
        pays for its fit.

        With a long first gap one picture in fifty becomes another one, which takes `MANY` prompts
        to see: on embedded flux (10 of 50) 64 prompts end at 53.3 / 46.4 / 34.0 dB without this
        (mean, p10, minimum of 64 unseen ones), with it at 52.9 / 48.7 / 41.6.
        """
        early = [steps for steps in lists if not first_gap(steps, self._steps)]
        own, prompts = leader.spec.schedule.full_steps, len(self.job.prompts)
        if prompts < MANY or not early or not first_gap(own, self._steps):
            return leader
        if prompts * len(early[0]) > budget:
            return leader
        steps = self._steps
        both = [leader, self.fit(early[:1], 0)]
        return max(both, key=lambda r: quality(r) - handicap(r.spec.schedule.full_steps, steps))

    def joint_fit(self, leader: Rollout, rounds: int, budget: float) -> Rollout:
        """All gaps of a rollout fitted together, on the final latents."""
        return joint_fit(self.job, leader, self.statistics.sigmas, rounds, budget)

    def store_open_loop(self, full_steps: Steps) -> None:
        """Put a list with the rows that the statistics alone give into the forecaster."""
        plan, sigmas = self._plan(full_steps), self.statistics.sigmas
        for branch in self.statistics.branches:
            self.forecaster.correct(plan, sigmas, branch, self._prior(plan, sigmas, branch))

    def forget(self, count: int, but: Schedule | None = None) -> None:
        """Take the calibrations of a number of full steps, but for one list, out of the
        forecaster."""
        sigmas = self.statistics.sigmas
        self.forecaster.calibrations[:] = [
            entry
            for entry in self.forecaster.calibrations
            if len(entry.schedule.full_steps) != count
            or entry.schedule == but
            or not entry.matches(entry.schedule, sigmas)
        ]

    def store(
        self, rollout: Rollout, worth: Worth | None = None, guard: Guard | None = None
    ) -> None:
        """Put a rollout's coefficients, with their guard and what they are worth, into the
        forecaster, in the place of others of as many full steps."""
        spec = rollout.spec
        for branch, known in rollout.result.stored().items():
            self.forecaster.correct(spec.schedule, self.statistics.sigmas, branch, *known)
        entry = self.forecaster.recommend(spec.schedule, self.statistics.sigmas)
        entry.worth, entry.guard = worth, guard
        self.forget(len(spec.schedule.full_steps), but=spec.schedule)

    def tell(self, rollout: Rollout, worth: Worth | None) -> None:
        """Say how good a list is."""
        plan, score = rollout.spec.schedule, rollout.result.score
        assert score is not None
        told = f"latents {score.mean():.1f} dB mean"
        if worth is not None:
            held = len(self.job.held_out) * self.job.pictures
            some = f" ({held} held out)" if 0 < held < worth.pictures else ""
            kind = "held-out " if held == worth.pictures else ""
            told = (
                f"{worth.pictures} {kind}pictures{some} {worth.mean:.1f} dB mean, "
                f"{worth.minimum:.1f} dB minimum"
            )
        full = ", ".join(map(str, plan.full_steps))
        self.job.progress.line(
            f"fitted: {len(plan.full_steps)} of {plan.steps} steps in full ({full}): {told} "
            "against the plain run"
        )

    def _run(
        self,
        rollouts: Sequence[Rollout],
        prompts: Sequence[int] | None = None,
    ) -> None:
        run_rollouts(self.job, rollouts, self._prior, self._steps, self.statistics, prompts)

    def _rollout(
        self,
        plan: Schedule,
        drift: float | None = None,
        shrinkage: float = SHRINKAGES[0],
    ) -> Rollout:
        history, latent = self.forecaster.settings.history, self.forecaster.uses_latent
        drift = self._drifts()[0] if drift is None else drift
        return Rollout(RolloutSpec(plan, history, latent, drift, shrinkage=shrinkage))

    def _drifts(self) -> tuple[float, ...]:
        """Values of beta to try; only 0 where nothing is known of the sampler."""
        sampler = self.statistics.sampler
        if sampler is None or not sampler.trusted:
            return (0.0,)
        return DRIFTS if sampler.misfit < EXACT else GENTLE

    def _prior(self, plan: Schedule, _sigmas: tuple[float, ...], branch: str) -> Tensor:
        """The rows that the statistics alone give."""
        history = self.forecaster.settings.history
        rows = torch.zeros(plan.steps, history + self.forecaster.uses_latent).double()
        for step in plan.skipped_steps:
            cached = plan.cached_before(step, history)
            weights = torch.from_numpy(self.plain.coefficients(branch, step, cached)[1])
            rows[step, : len(cached)] = weights[: len(cached)]
            rows[step, history:] = weights[len(cached) :]
        return rows

    def _plan(self, full_steps: tuple[int, ...]) -> Schedule:
        return Schedule.explicit(full_steps, self._steps)

    @property
    def _steps(self) -> int:
        return self.statistics.num_steps
