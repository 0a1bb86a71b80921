"""Which steps to compute in full: local search on the statistics, then on true accelerated
runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch

from lesa.core.schedule import Schedule, spread
from lesa.errors import LesaError
from lesa.training.statistics import Statistics

Vector = npt.NDArray[np.float64]
Steps = tuple[int, ...]
TAIL_SHARE = 0.5  # of the 10th percentile beside the mean, which alone would sacrifice the tail


def balanced(scores: Vector | torch.Tensor) -> float:
    """Mean and 10th percentile of per-prompt scores in dB, equally weighted; the objective of every
    choice here."""
    values = np.asarray(scores, dtype=np.float64)
    return float((1 - TAIL_SHARE) * values.mean() + TAIL_SHARE * np.quantile(values, 0.1))


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
        self.rates = statistics.influence()
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
        """-10 log10 of the final latent's squared error per prompt; higher is better."""
        schedule = Schedule.explicit(full_steps, self.statistics.num_steps)
        errors = {branch: self._total(branch, schedule) for branch in self.statistics.branches}
        energy = np.zeros(len(self.joint))
        for group in self.groups:
            total = sum(place @ errors[branch] for branch, place in group)
            energy += (self.joint @ total) @ total / len(self.groups)
        return -10 * np.log10(np.maximum(energy, 1e-12))

    def _total(self, branch: str, schedule: Schedule) -> Vector:
        """A branch's share of the final latent's error, in its own basis."""
        total = np.zeros(self.statistics.size)
        for step in schedule.skipped_steps:
            cached = schedule.cached_before(step, self.history)
            indices, weights = self._error(branch, step, cached)
            np.add.at(total, indices, self.rates[branch][step] * weights)
        return total

    def quality(self, full_steps: Steps) -> float:
        return balanced(self.scores(full_steps))


def neighbours(full_steps: Steps, num_steps: int, reach: int) -> Iterable[Steps]:
    """Every list in which one full step other than 0 has moved by at most ``reach`` to a free
    place."""
    taken = set(full_steps)
    for old in full_steps[1:]:
        for new in range(max(1, old - reach), min(num_steps, old + reach + 1)):
            if new not in taken:
                yield tuple(sorted((taken - {old}) | {new}))


def climb(
    start: Steps, num_steps: int, quality: Callable[[Steps], float], reach: int = 4
) -> tuple[Steps, float]:
    """Move one full step at a time, best move first, until none improves."""
    best, score = start, quality(start)
    while True:
        found = max(
            ((quality(candidate), candidate) for candidate in neighbours(best, num_steps, reach)),
            default=(score, best),
        )
        if not found[0] > score + 1e-9:  # nor where a score is not a number
            return best, score
        score, best = found


def even(count: int, num_steps: int) -> list[Steps]:
    """Full steps at equal distances, and a little or much denser towards both ends."""
    places = np.arange(count) / count
    bend = np.sin(2 * np.pi * places) / (2 * np.pi)
    return [spread(num_steps * (places - dense * bend), num_steps) for dense in (0.0, 0.3, 0.6)]


STARTS = 5


def starts(count: int, num_steps: int) -> list[Steps]:
    """`STARTS` step lists: even ones, and ones that grow denser towards either end."""
    places = np.arange(count) / count
    lists = [spread(num_steps * places**power, num_steps) for power in (0.6, 1.6)]
    return [*even(count, num_steps), *lists]


def search_schedule(
    statistics: Statistics,
    full_steps: int,
    *,
    history: int = 3,
    judge: OpenLoop | None = None,
    advance: Callable[[], object] = lambda: None,
) -> Schedule:
    """The ``full_steps`` steps whose open-loop forecasts lose least, by mean and 10th percentile.

    ``advance`` is called `STARTS` times on the way.

    Raises LesaError for a count below 1 or above the step count.
    """
    count, num_steps = full_steps, statistics.num_steps
    if not 1 <= count <= num_steps:
        raise LesaError(
            f"full_steps={count} is impossible with {num_steps} steps: choose 1 to {num_steps}"
        )
    judge = judge or OpenLoop(statistics, history)
    found = []
    for start in starts(count, num_steps):
        found.append(climb(start, num_steps, judge.quality))
        advance()
    return Schedule.explicit(max(found, key=lambda pair: pair[1])[0], num_steps)
