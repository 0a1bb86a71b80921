"""Which steps to compute in full: what the statistics of the plain runs say of step lists."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, combinations, product, zip_longest
from math import comb

import numpy as np
import numpy.typing as npt

from lesa.core.schedule import Schedule, check_count
from lesa.forecasters.prior import FITTED, prior_schedule
from lesa.training.objective import objective
from lesa.training.simulate import Simulation
from lesa.training.statistics import Statistics

Vector = npt.NDArray[np.float64]
Steps = tuple[int, ...]
EARLY = (0.0, 0.12, 0.25, 0.45, 0.6, 0.75, 0.9, 1.1)  # of shapes that are tried
LATER = (0.5, 0.75, 1.0, 1.3)
FIRST_GAPS = (0.04, 0.12)  # bounds of early, medium and late second full steps, of all steps
ALL = 40  # lists are all tried where there are no more, as on few-step models
LATE = 1.0  # dB


class OpenLoop:
    """Predicted quality of a step list from Gram matrices alone.

    Each skipped step gets its least-squares forecast on the base features. The forecast errors
    e_s, times what the sampler makes of them, add up to the error of the final latent,
    sum_{s,b} (dx_T / dv_{s,b}) e_{s,b} over steps and guidance branches, whose energy per picture
    is again an inner product. Where the sampler is not known (hidden tap) the factor is dsigma,
    and the energies of the branches' rows are averaged.
    """

    def __init__(self, statistics: Statistics, history: int, ridge: float = 1e-6) -> None:
        self.statistics, self.history, self.ridge = statistics, history, ridge
        self.joint = statistics.joint.numpy()
        self.means = {branch: statistics.mean(branch).numpy() for branch in statistics.branches}
        self.rates, self.scale = statistics.influence(), statistics.final_energy()
        self._errors: dict[tuple[str, int, Steps], tuple[npt.NDArray[np.int64], Vector]] = {}
        # Groups of (branch, its place in the joint basis): errors add up within a group only.
        embedded = [
            (branch, statistics.embed(branch, way).numpy())
            for branch in statistics.branches
            for way in statistics.ways(branch)
        ]
        self.groups = [[part] for part in embedded] if statistics.sampler is None else [embedded]

    def coefficients(
        self, branch: str, step: int, cached: Steps
    ) -> tuple[npt.NDArray[np.int64], Vector]:
        """Basis indices of the regressors (cached features, then the latent) and their least-
        squares weights."""
        indices = np.array(
            [*cached, *([self.statistics.latent(step)] if self.statistics.has_latent else [])]
        )
        gram = self.means[branch]
        moments = gram[np.ix_(indices, indices)]
        start = np.zeros(len(indices))
        start[0] = 1.0
        pull = self.ridge * np.trace(moments) / len(indices) * np.eye(len(indices))
        return indices, start + np.linalg.solve(
            moments + pull, gram[indices, step] - moments @ start
        )

    def _error(self, branch: str, step: int, cached: Steps) -> tuple[npt.NDArray[np.int64], Vector]:
        key = (branch, step, cached)
        if key not in self._errors:
            indices, weights = self.coefficients(branch, step, cached)
            self._errors[key] = np.append(indices, step), np.append(weights, -1.0)
        return self._errors[key]

    def scores(self, full_steps: Steps) -> Vector:
        """The error of the final latent per picture, relative to its mean square, in dB; higher is
        better."""
        schedule = Schedule.explicit(full_steps, self.statistics.num_steps)
        errors = {branch: self._total(branch, schedule) for branch in self.rates}
        energy = np.zeros(len(self.joint))
        for group in self.groups:
            total = sum(place @ errors[branch] for branch, place in group)
            energy += (self.joint @ total) @ total / len(self.groups)
        return -10 * np.log10(np.maximum(energy / self.scale, 1e-12))

    def _total(self, branch: str, schedule: Schedule) -> Vector:
        """A branch's share of the final latent's error, in its own basis."""
        total = np.zeros(self.statistics.size)
        for step in schedule.skipped_steps:
            cached = schedule.cached_before(step, self.history)
            indices, weights = self._error(branch, step, cached)
            np.add.at(total, indices, self.rates[branch][step] * weights)
        return total

    def quality(self, full_steps: Steps) -> float:
        """The objective of the scores."""
        return objective(self.scores(full_steps))


Judge = OpenLoop | Simulation


def judge_of(statistics: Statistics, history: int) -> Judge:
    """What predicts the quality of step lists: a simulation where the sampler is known."""
    if Simulation.possible(statistics):
        return Simulation(statistics, history)
    return OpenLoop(statistics, history)


def neighbours(full_steps: Steps, num_steps: int, reach: int) -> Iterable[Steps]:
    """Every list in which one full step after the first has moved by at most ``reach`` to a free
    place."""
    taken = set(full_steps)
    for old in full_steps[1:]:
        for new in range(max(1, old - reach), min(num_steps, old + reach + 1)):
            if new not in taken:
                yield tuple(sorted((taken - {old}) | {new}))


def first_gap(full_steps: Steps, num_steps: int) -> int:
    """0 where the second full step is early (at most 2 of 50), 1 where it is medium, 2 where it is
    late (beyond 6 of 50)."""
    second = full_steps[1] if len(full_steps) > 1 else 0
    return sum(second > max(1, round(bound * num_steps)) for bound in FIRST_GAPS)


def handicap(full_steps: Steps, num_steps: int) -> float:
    """dB by which a list whose second full step is not early has to be better than others.

    In the first steps it is decided what the picture shows. With a long first gap one picture of
    fifteen to fifty becomes another one, which a few calibration prompts do not show: on embedded
    HunyuanVideo (10 of 50) the worst of 24 unseen prompts has 13 to 15 dB (latents) where the
    second full step is 1 or 2, 4 dB where it is 3 or later, at means within 1 dB.
    """
    return LATE if first_gap(full_steps, num_steps) else 0.0


def shaped(count: int, statistics: Statistics) -> list[Steps]:
    """Step lists of the untrained prior with more or fewer full steps at either end, those most
    like its own first; then all others, where there are not many."""
    own = FITTED
    shapes = sorted(
        product(EARLY, LATER), key=lambda s: abs(s[0] - own.early) + abs(s[1] - own.late)
    )
    steps, sigmas = statistics.num_steps, statistics.sigmas
    lists = [
        prior_schedule(count, steps, sigmas, replace(own, early=early, late=late)).full_steps
        for early, late in shapes
    ]
    if comb(steps - 1, count - 1) <= ALL:
        lists += [(0, *others) for others in combinations(range(1, steps), count - 1)]
    return [*dict.fromkeys(lists)]


def candidates(judge: Judge, count: int) -> list[Steps]:
    """Step lists for accelerated runs to choose from, in turn from four rows.

    One row has the lists of `shaped` whose second full step is early, those most like the prior's
    own first; the others have those with an early, a medium and a late one, the best on the
    statistics first. How long the first gap may be is left to accelerated runs: an error at high
    noise changes what the model sees at every later full step, and statistics of plain runs know
    nothing of that. Nor do single steps move here: lists that climb on the statistics are 0.3 to 5
    dB worse on unseen prompts of three embedded pipelines than the shapes that they began at.
    """
    num_steps, lists = judge.statistics.num_steps, shaped(count, judge.statistics)
    kinds = [[x for x in lists if first_gap(x, num_steps) == gap] for gap in range(3)]
    ranked = [sorted(kind, key=judge.quality, reverse=True) for kind in kinds]
    turns = chain.from_iterable(zip_longest(kinds[0], *ranked))
    return [*dict.fromkeys(steps for steps in turns if steps is not None)]


def search_schedule(
    statistics: Statistics, full_steps: int, *, history: int = 3, judge: Judge | None = None
) -> Schedule:
    """The ``full_steps`` steps that lose least on the statistics.

    Raises LesaError for a count below 1 or above the step count.
    """
    count, num_steps = full_steps, statistics.num_steps
    check_count(count, num_steps)
    judge = judge or judge_of(statistics, history)
    ahead = {x: judge.quality(x) - handicap(x, num_steps) for x in candidates(judge, count)}
    best = max(ahead, key=ahead.__getitem__)
    return Schedule.explicit(best, num_steps)
