"""Step lists that a forecaster was calibrated on, with the rows fitted to them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lesa.core.schedule import Schedule, spread
from lesa.errors import LesaError

SIGMA_TOLERANCE = 1e-4


@dataclass(eq=False)
class Calibration:
    """A bound schedule, its S + 1 noise levels, and per guidance branch the whole rows of a table.

    `rows[branch]` is float64 [S, K + uses_latent]: the form's coefficients plus the correction.
    `split[branch]` [S, K + uses_latent, P] are separate coefficients of batched guidance parts.
    """

    schedule: Schedule
    sigmas: tuple[float, ...]
    rows: dict[str, Tensor] = field(default_factory=dict)
    split: dict[str, Tensor] = field(default_factory=dict)

    def matches(self, schedule: Schedule, sigmas: Sequence[float]) -> bool:
        """The very same full steps, and every noise level within 1e-4."""
        return self.schedule == schedule and self.distance(sigmas) <= SIGMA_TOLERANCE

    def distance(self, sigmas: Sequence[float]) -> float:
        """The largest difference between the noise levels, infinite for another step count."""
        if len(sigmas) != len(self.sigmas):
            return float("inf")
        return max(abs(a - b) for a, b in zip(sigmas, self.sigmas, strict=True))

    def resampled(self, sigmas: Sequence[float]) -> Schedule:
        """The full steps of another run that lie nearest to these in noise level."""
        steps = len(sigmas) - 1
        places = [_place(self.sigmas[s], sigmas) for s in self.schedule.full_steps]
        return Schedule.explicit(spread([0.0, *places[1:]], steps), steps)


def schedule_for(
    calibrations: Sequence[Calibration],
    full_steps: int,
    num_steps: int,
    sigmas: Sequence[float] | None = None,
) -> Schedule:
    """The calibrated schedule with this many full steps, resampled when the step count differs.

    Resampling goes by noise level when the run's S + 1 `sigmas` are given, else by the fraction of
    the steps. A count that was not calibrated gets the nearest calibrated list, its full steps
    spread anew with the same density. Raises LesaError when nothing is calibrated.
    """
    if not 1 <= full_steps <= num_steps:
        raise LesaError(f"full_steps={full_steps} is not in 1..num_steps={num_steps}; choose less")
    if not calibrations:
        raise LesaError(
            f"full_steps={full_steps} has no schedule to follow: the forecaster is not calibrated; "
            "pass schedule=..., or train with this count"
        )
    best = min(abs(len(c.schedule.full_steps) - full_steps) for c in calibrations)
    found = [c for c in calibrations if abs(len(c.schedule.full_steps) - full_steps) == best]
    nearest = min(found, key=lambda c: abs(c.schedule.steps - num_steps))
    if nearest.schedule.steps == num_steps:
        same = [c for c in found if c.schedule.steps == num_steps]
        schedule = min(same, key=lambda c: c.distance(sigmas or c.sigmas)).schedule
    elif sigmas:
        schedule = nearest.resampled(sigmas)
    else:
        schedule = nearest.schedule.resampled(num_steps)
    return schedule if best == 0 else thinned(schedule, full_steps)


def thinned(schedule: Schedule, full_steps: int) -> Schedule:
    """A bound schedule with another number of full steps, spread with the same density."""
    known = [*schedule.full_steps, schedule.steps]
    places = []
    for index in range(full_steps):
        at, share = divmod(index * (len(known) - 1), full_steps)
        gap = known[min(at + 1, len(known) - 1)] - known[at]
        places.append(known[at] + gap * share / full_steps)
    return Schedule.explicit(spread(places, schedule.steps), schedule.steps)


def _place(sigma: float, sigmas: Sequence[float]) -> float:
    """The fractional step of a decreasing list at which it passes `sigma`."""
    at = bisect_left(sigmas, -sigma, key=lambda level: -level)
    if at == 0 or at == len(sigmas):
        return float(min(at, len(sigmas) - 1))
    return at - (sigma - sigmas[at]) / (sigmas[at - 1] - sigmas[at])
