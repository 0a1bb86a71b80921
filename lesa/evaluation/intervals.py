"""How sure a number is: bootstrap intervals over the prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import ceil
from typing import TypedDict

import torch
from torch import Tensor

from lesa.errors import LesaError

LEVEL = 0.95
RESAMPLES = 1000


class Estimate(TypedDict):
    """A number and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def mean(values: Tensor) -> Tensor:
    """Mean over the last dimension."""
    return values.mean(-1)


def percentile_10(values: Tensor) -> Tensor:
    """10th percentile over the last dimension, interpolated; infinite where it falls on identical
    pictures."""
    ordered, place = values.sort(-1).values, 0.1 * (values.shape[-1] - 1)
    low, high = ordered[..., int(place)], ordered[..., ceil(place)]
    return torch.where(low == high, low, low + (place - int(place)) * (high - low))


def bootstrap(
    statistic: Callable[..., Tensor],
    *samples: Sequence[float] | Tensor,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """A statistic of n prompts and its percentile bootstrap interval (Efron 1979).

    Prompts are drawn n times with replacement, `resamples` times; the interval holds the middle
    `level` of the statistic's values. Of several samples [n] the same prompts are drawn, so that
    an interval of a difference is paired. The percentile interval, not BCa, since the acceleration
    of BCa is undefined for a quantile. Infinite values (identical pictures) are ordered like
    others.

    Args:
        statistic: takes one tensor [..., n] per sample, gives [...].

    Raises: LesaError if a sample is empty, or their lengths differ.
    """
    columns = [torch.as_tensor(sample, dtype=torch.float64) for sample in samples]
    count = len(columns[0])
    if not count or any(len(column) != count for column in columns):
        lengths = [len(column) for column in columns]
        raise LesaError(f"samples: lengths {lengths}; give equally many values, at least one")
    drawn = _draws(count, resamples, seed)
    found = statistic(*(column[drawn] for column in columns)).sort().values
    below = int((1 - level) / 2 * resamples)  # of the resamples, on either side
    return Estimate(
        value=float(statistic(*columns)),
        low=float(found[below]),
        high=float(found[-1 - below]),
    )


@lru_cache(maxsize=8)
def _draws(count: int, resamples: int, seed: int) -> Tensor:
    """Which prompts each resample holds, [resamples, count]: the same for all of a comparison."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(count, (resamples, count), generator=generator)
