"""Step lists that a forecaster was calibrated on, with the rows fitted to them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import pi, sin

from lesa_kernels.checks import MAX_HISTORY
from torch import Tensor

from lesa.core.schedule import Schedule, check_count, spread
from lesa.errors import LesaError
from lesa.forecasters.guard import Guard
from lesa.forecasters.worth import Worth

SIGMA_TOLERANCE = 1e-4
# Up to this many times the full steps of a calibrated list, steps are added to it; beyond that the
# list is spread anew. On embedded flux with 10 of 50 calibrated (54.5 dB) that is 54.8 against 49.5
# dB at 11 full steps and 54.9 against 53.3 at 13, but 55.6 against 56.0 at 16.
GROWTH = 1.5
BEND = 0.3  # by how much a gap at either end of a list that is spread anew is below the mean


@dataclass(eq=False)
class Calibration:
    """A bound schedule, its S + 1 noise levels, and per guidance branch the whole rows of a table.

    `rows[branch]` is float64 [S, K + uses_latent]: the form's coefficients plus the correction.
    `split[branch]` [S, K + uses_latent, P] are separate coefficients of batched guidance parts.
    `worth` is what training measured of it, if it did; `guard` is what a picture at risk runs
    instead, if that pays.
    """

    schedule: Schedule
    sigmas: tuple[float, ...]
    rows: dict[str, Tensor] = field(default_factory=dict)
    split: dict[str, Tensor] = field(default_factory=dict)
    worth: Worth | None = None
    guard: Guard | None = None

    @property
    def mean_full_steps(self) -> float:
        """How many full steps a picture takes, in the mean where a guard spends some."""
        count = len(self.schedule.full_steps)
        return count if self.guard is None else self.guard.mean_full_steps(self.schedule)

    def matches(self, schedule: Schedule, sigmas: Sequence[float]) -> bool:
        """The very same full steps, and every noise level within 1e-4."""
        return self.schedule == schedule and self.distance(sigmas) <= SIGMA_TOLERANCE

    def serves(self, schedule: Schedule, sigmas: Sequence[float]) -> bool:
        """Whether this list was fitted, or the one that its guard changes to."""
        guard = self.guard
        if guard is not None and guard.rows and guard.schedule == schedule:
            return self.distance(sigmas) <= SIGMA_TOLERANCE
        return self.matches(schedule, sigmas)

    def distance(self, sigmas: Sequence[float]) -> float:
        """The largest difference between the noise levels, infinite for another step count."""
        if len(sigmas) != len(self.sigmas):
            return float("inf")
        return max(abs(a - b) for a, b in zip(sigmas, self.sigmas, strict=True))

    def resampled(
        self, schedule: Schedule, num_steps: int, sigmas: Sequence[float] | None
    ) -> Schedule:
        """A list of this step count on another run: its steps nearest in noise level, or as
        fractions of the run where its levels are not known."""
        if not sigmas:
            return schedule.resampled(num_steps)
        places = [_place(self.sigmas[s], sigmas) for s in schedule.full_steps]
        return Schedule.explicit(spread([0.0, *places[1:]], num_steps), num_steps)

    def extended_to(
        self, schedule: Schedule, branch: str, history: int
    ) -> tuple[Tensor, Tensor | None] | None:
        """The coefficients, and the separate ones if there are any, of a list with further steps.

        What a skipped step weighs stays as it was fitted. Its features lie further back in the ring
        now, behind those of the added steps, which nothing weighs: by the form's own coefficients
        an 11th step on embedded flux gives 53.7 dB, like this 54.8, and the list of 10 itself 54.5.
        None where a row would reach back further than the features that a kernel mixes.
        """
        places = {
            step: [
                schedule.cached_before(step, step).index(cached)
                for cached in self.schedule.cached_before(step, history)
            ]
            for step in schedule.skipped_steps
        }
        width = max([history, *(at + 1 for row in places.values() for at in row)])
        if width > MAX_HISTORY:
            return None
        split = self.split.get(branch)
        moved = _moved(self.rows[branch], places, history, width)
        return moved, None if split is None else _moved(split, places, history, width)


def extended(
    calibrations: Sequence[Calibration],
    schedule: Schedule,
    sigmas: Sequence[float],
    branch: str,
    history: int,
) -> tuple[Tensor, Tensor | None] | None:
    """What was fitted to the longest list that this one only adds full steps to; None without."""
    full = set(schedule.full_steps)
    served = [
        entry
        for entry in calibrations
        if branch in entry.rows
        and full > set(entry.schedule.full_steps)
        and len(full) <= GROWTH * len(entry.schedule.full_steps)
        and entry.distance(sigmas) <= SIGMA_TOLERANCE
    ]
    if not served:
        return None
    longest = max(served, key=lambda entry: len(entry.schedule.full_steps))
    return longest.extended_to(schedule, branch, history)


def schedule_for(
    calibrations: Sequence[Calibration],
    full_steps: int,
    num_steps: int,
    sigmas: Sequence[float] | None = None,
) -> Schedule:
    """The calibrated schedule with this many full steps, resampled when the step count differs.

    Resampling goes by noise level when the run's S + 1 `sigmas` are given, also where only these
    differ, else by the fraction of the steps. A count that was not calibrated gets the next smaller
    calibrated list with steps added in its widest gaps, up to GROWTH times as many; else steps
    spread anew over the nearest one's run. Raises LesaError when nothing is calibrated.
    """
    check_count(full_steps, num_steps)
    if not calibrations:
        raise LesaError(
            f"full_steps={full_steps}: no schedule to follow, since the forecaster is not "
            "calibrated; pass schedule=..., or train with this count"
        )
    base = base_count(calibrations, full_steps)
    found = [c for c in calibrations if len(c.schedule.full_steps) == base]
    nearest = min(
        found, key=lambda c: (abs(c.schedule.steps - num_steps), c.distance(sigmas or c.sigmas))
    )
    schedule = nearest.schedule
    thins = not base <= full_steps <= GROWTH * base
    if thins and full_steps <= schedule.steps:  # before it is resampled: the run may be too short
        schedule = spread_anew(full_steps, schedule.steps)
    elsewhere = sigmas is not None and nearest.distance(sigmas) > SIGMA_TOLERANCE
    if schedule.steps != num_steps or elsewhere:
        schedule = nearest.resampled(schedule, num_steps, sigmas)
    if len(schedule.full_steps) == full_steps:
        return schedule
    if thins:
        return spread_anew(full_steps, num_steps)
    known = nearest.sigmas if nearest.schedule.steps == num_steps else None
    return grown(schedule, full_steps, sigmas or known)


def base_count(calibrations: Sequence[Calibration], full_steps: int) -> int:
    """The calibrated count that a list of this many full steps is made from: the next smaller one
    if it need not grow beyond GROWTH, else the nearest."""
    counts = {len(c.schedule.full_steps) for c in calibrations}
    smaller = [count for count in counts if count <= full_steps <= GROWTH * count]
    return max(smaller) if smaller else min(counts, key=lambda count: abs(count - full_steps))


def count_on(calibrated: Schedule, num_steps: int) -> int:
    """As many full steps as were calibrated, or the same share of a run that is not longer."""
    count = len(calibrated.full_steps)
    return count if count < num_steps else max(1, round(count * num_steps / calibrated.steps))


def untrained(calibrations: Sequence[Calibration], full_steps: int) -> str | None:
    """What is run where this number of full steps was not calibrated: "10 with 1 more full" (whose
    coefficients are kept) or "10 spread anew" (without coefficients that were fitted)."""
    base = base_count(calibrations, full_steps) if calibrations else full_steps
    if base == full_steps:
        return None
    more = keeps_rows(calibrations, full_steps)
    return f"{base} with {full_steps - base} more full" if more else f"{base} spread anew"


def keeps_rows(calibrations: Sequence[Calibration], full_steps: int) -> bool:
    """Whether so many full steps are run with fitted rows, of a list that they only add to."""
    base = base_count(calibrations, full_steps)
    fitted = any(entry.rows for entry in calibrations)
    return fitted and base <= full_steps <= GROWTH * base


def grown(schedule: Schedule, full_steps: int, sigmas: Sequence[float] | None = None) -> Schedule:
    """A bound schedule with further full steps, each in the middle of the gap that is the widest
    in noise level, or in steps where the S + 1 levels are not known.

    A gap keeps a skipped step as long as another one has two, and the last gap longest: fitted
    forecasts also correct what went wrong before them. On embedded flux with 5 of 20 steps trained
    (35.7 dB), a 6th and 7th step give 39.0 dB so, but 35.9 where the 7th is the run's last step.
    """
    levels = sigmas or [-float(step) for step in range(schedule.steps + 1)]
    full = list(schedule.full_steps)
    while len(full) < full_steps:
        gaps = [gap for gap in pairwise([*full, schedule.steps]) if gap[1] - gap[0] > 1]

        def rank(gap: tuple[int, int]) -> tuple[bool, bool, float]:
            low, high = gap
            keeps = high - low > 2
            return keeps, keeps or high < schedule.steps, levels[low] - levels[high]

        low, high = max(gaps, key=rank)
        middle = (levels[low] + levels[high]) / 2
        added = min(range(low + 1, high), key=lambda step: abs(levels[step] - middle))
        full = sorted([*full, added])
    return Schedule.explicit(full, schedule.steps)


def spread_anew(full_steps: int, num_steps: int) -> Schedule:
    """Nearly even steps, a little denser at both ends: where no rows were fitted to a list, one
    that was searched for such rows is no better.

    With 10 of 50 trained and damped rows, 5 of 12 steps give 38.5 dB on embedded flux and 33.0 on
    sdxl so, 31.7 and 32.0 with the density of the trained list; 6 of 20 give 39.9 and 34.7 against
    39.7 and 32.8, 8 of 50 on flux 43.3 against 41.6.
    """
    places = [index / full_steps for index in range(full_steps)]
    bent = [place - BEND * sin(2 * pi * place) / (2 * pi) for place in places]
    return Schedule.explicit(spread([num_steps * place for place in bent], num_steps), num_steps)


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


def _moved(rows: Tensor, places: Mapping[int, Sequence[int]], history: int, width: int) -> Tensor:
    """Rows [S, history (+ 1), ...] in a table of `width` features, each weight at its new place."""
    moved = rows.new_zeros(rows.shape[0], width + rows.shape[1] - history, *rows.shape[2:])
    moved[:, width:] = rows[:, history:]
    for step, columns in places.items():
        moved[step, list(columns)] = rows[step, : len(columns)]
    added = [step for step in range(len(rows)) if step not in places]
    moved[added] = 0
    return moved
