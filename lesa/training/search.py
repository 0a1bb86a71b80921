"""Which steps to compute in full: local search on the statistics, then on true accelerated
runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch

from lesa.errors import LesaError
from lesa.schedule import Schedule, spread
from lesa.training.statistics import Statistics

Vector = npt.NDArray[np.float64]
Steps = tuple[int, ...]
TAIL_SHARE = 0.5  # of the worst decile beside the mean, which alone would sacrifice the tail


def balanced(scores: Vector | torch.Tensor) -> float:
    """Mean and worst decile of per-prompt scores in dB, equally weighted; the objective of every
    choice here."""
    values = np.asarray(scores, dtype=np.float64)
    return float((1 - TAIL_SHARE) * values.mean() + TAIL_SHARE * np.quantile(values, 0.1))


class OpenLoop:
    """Predicted quality of a step list from Gram matrices alone.

    Each skipped step gets its least-squares forecast on the base features; the forecast errors
    e_s, times the step sizes, add up to the error of the final latent, sum_s dsigma_s e_s, whose
    energy per prompt is again an inner product.
    """

    def __init__(self, statistics: Statistics, history: int, ridge: float = 1e-6) -> None:
        self.statistics, self.history, self.ridge = statistics, history, ridge
        self.grams = {branch: gram.numpy() for branch, gram in statistics.grams.items()}
        self.means = {branch: gram.mean(0) for branch, gram in self.grams.items()}
        self.rates = np.diff(np.array(statistics.sigmas))
        self._errors: dict[tuple[str, int, Steps], tuple[npt.NDArray[np.int64], Vector]] = {}

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
        energy = np.zeros(len(next(iter(self.grams.values()))))
        for branch, grams in self.grams.items():
            total = np.zeros(self.statistics.size)
            for step in schedule.skipped_steps:
                indices, weights = self._error(
                    branch, step, schedule.cached_before(step, self.history)
                )
                np.add.at(total, indices, self.rates[step] * weights)
            energy = energy + (grams @ total) @ total
        return -10 * np.log10(np.maximum(energy / len(self.grams), 1e-12))

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
        if found[0] <= score + 1e-9:
            return best, score
        score, best = found


def starts(count: int, num_steps: int) -> list[Steps]:
    """Evenly spread step lists, and lists that grow denser towards either end."""
    return [
        spread([num_steps * (place / count) ** power for place in range(count)], num_steps)
        for power in (1.0, 0.6, 1.6)
    ]


def search_schedule(
    statistics: Statistics, full_steps: int, *, history: int = 3, judge: OpenLoop | None = None
) -> Schedule:
    """The ``full_steps`` steps whose open-loop forecasts lose least, by mean and worst decile.

    Raises LesaError for a count below 1 or above the step count.
    """
    count, num_steps = full_steps, statistics.num_steps
    if not 1 <= count <= num_steps:
        raise LesaError(
            f"full_steps={count} is impossible with {num_steps} steps: choose 1 to {num_steps}"
        )
    judge = judge or OpenLoop(statistics, history)
    found = [climb(start, num_steps, judge.quality) for start in starts(count, num_steps)]
    return Schedule.explicit(max(found, key=lambda pair: pair[1])[0], num_steps)
