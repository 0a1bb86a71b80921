"""What is run where nobody has trained anything: full steps and coefficients by noise level."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from math import ceil

from lesa.core.checks import MOST_STEPS, whole
from lesa.core.forecaster import Tap, check_sigmas
from lesa.core.schedule import Schedule, check_count, spread
from lesa.core.table import Table

__all__ = [
    "FITTED",
    "Prior",
    "Shape",
    "default_count",
    "own_shift",
    "prior_schedule",
    "quality_count",
    "times",
    "widest_gaps",
]

_CELLS = 4096  # of the integral over the density of full steps
OWN, LEAST_SHIFT = 1.6, 2.5  # see `Shape.shift_on`
EVEN = 0.01  # of a run, by which the steps of a flow schedule may be off
MULTISTEP, MULTISTEP_WIDTH = 2 / 3, 0.1  # of a line for samplers that extrapolate themselves
SHARE = 5  # full steps are one in so many by default,
LEAST = 10  # but not fewer than these, or two fifths of a shorter run


@dataclass(frozen=True)
class Shape:
    """The numbers of the prior; the default is what benchmarks/fit_prior.py found.

    Attributes:
        shift: of the flow schedule whose even steps are the unit of time, at most: see `shift_on`.
        early, late: how much denser full steps lie at either end: their gap at the share y of them
            is in proportion to y^early (1 - y)^late.
        first, last: factors of a line's slope at the beginning and at the end of a run, where gaps
            are narrow.
        width: share of a run at which a gap's slope is halved.
    """

    shift: float = 5.0
    early: float = 0.6
    late: float = 0.75
    first: float = 1.0
    last: float = 1.5
    width: float = 0.15

    def shift_on(self, sigmas: Sequence[float]) -> float:
        """`shift`; on a flow schedule of a smaller shift 1.6 times that one, but 2.5 at least.

        Small and smooth pictures have schedules of a small shift, and their outputs turn later.
        """
        own = own_shift(sigmas)
        return self.shift if own is None else min(self.shift, max(OWN * own, LEAST_SHIFT))


FITTED = Shape()


@dataclass(frozen=True)
class Prior:
    """h_hat_s = h_p + c (h_p - h_q), a damped line through the last two full steps p and q.

        c = d(t_s) / (1 + (g / width)^3) * (t_s - t_p) / (t_p - t_q)

    t is the time of a step from 0 to 1 (`times`), d goes evenly from `first` to `last`, and g is
    the wider of the gap behind p and that before it. At high noise, where outputs turn, and over
    wide gaps, which nobody can forecast, it is closer to reuse; with one full step it is reuse.
    Samplers that extrapolate themselves get two thirds of c at a width of 0.1, those that add noise
    reuse.
    """

    shape: Shape = FITTED
    tap: Tap | None = None

    uses_latent = False
    name = "lesa-untrained"

    def history(self, schedule: Schedule) -> int:
        """Two features, or one where there is one full step."""
        return min(2, len(schedule.full_steps))

    def table(
        self,
        schedule: Schedule,
        sigmas: Sequence[float] = (),
        branch: str = "cond",
        *,
        multistep: bool = False,
        noise: bool = False,
    ) -> Table:
        """The damped lines as coefficients; steps are the unit where there are no `sigmas`.

        `multistep` and `noise` tell of a sampler that extrapolates over its steps, or adds noise.
        """
        trust = 0.0 if noise else MULTISTEP if multistep else 1.0
        levels = check_sigmas(schedule, sigmas) if sigmas else ()
        at = times(schedule.steps, levels, self.shape.shift_on(levels))
        gaps = widest_gaps(schedule, at)
        width = MULTISTEP_WIDTH if multistep else self.shape.width

        def row(step: int, cached: tuple[int, ...]) -> list[float]:
            if len(cached) < 2:
                return [1.0]
            newest, before = (at[s] for s in cached)
            line = (at[step] - newest) / (newest - before)
            weight = trust * self._damping(at[step], gaps[step], width) * line
            return [1 + weight, -weight]

        return Table.from_rows(schedule, self.history(schedule), row)

    def _damping(self, time: float, gap: float, width: float) -> float:
        own = self.shape.first + (self.shape.last - self.shape.first) * time
        return own / (1 + (gap / width) ** 3)


def prior_schedule(
    full_steps: int,
    num_steps: int,
    sigmas: Sequence[float] | None = None,
    shape: Shape = FITTED,
) -> Schedule:
    """So many full steps of a run, dense at both ends in the time of `times`.

    Raises LesaError for a count that the run does not have, or levels that do not fall.
    """
    num_steps = whole("num_steps", num_steps, 1, MOST_STEPS)
    full_steps = whole("full_steps", full_steps, 1)
    check_count(full_steps, num_steps)
    levels = check_sigmas(Schedule.explicit([0], num_steps), sigmas) if sigmas else ()
    at = times(num_steps, levels, shape.shift_on(levels))
    wanted = (_quantile(i / full_steps, shape.early, shape.late) for i in range(full_steps))
    return Schedule.explicit(spread([_place(time, at) for time in wanted], num_steps), num_steps)


def default_count(num_steps: int) -> int:
    """The number of full steps where none is asked for: every fifth, and in short runs more."""
    least = min(LEAST, ceil(num_steps * 2 / SHARE))
    return min(num_steps, max(1, round(num_steps / SHARE), least))


def quality_count(num_steps: int, quality: str) -> int:
    """The number of full steps that "best", "balanced" or "fast" stands for: 13, 10 or 8 of 50."""
    share = {"best": 1.3, "balanced": 1.0, "fast": 0.8}[quality]
    return min(num_steps, max(1, round(share * default_count(num_steps))))


def times(num_steps: int, sigmas: Sequence[float], shift: float) -> list[float]:
    """When each of the S + 1 levels is reached: 0 at the first, 1 at the last one.

    A flow schedule of this shift takes even steps in it, sigma = shift u / (1 + (shift - 1) u) at
    u before the end. Without levels every step takes as long.
    """
    if not sigmas:
        return [step / num_steps for step in range(num_steps + 1)]
    left = [sigma / (shift - (shift - 1) * sigma) for sigma in sigmas]
    return [(left[0] - u) / (left[0] - left[-1]) for u in left]


def own_shift(sigmas: Sequence[float]) -> float | None:
    """The shift with which S + 1 levels are those of a flow schedule, or of the end of one; None
    where they are not."""
    steps = len(sigmas) - 1
    if steps < 2:
        return None
    first, middle, left = sigmas[0], sigmas[steps // 2], 1 - (steps // 2) / steps
    bent = (1 - left) * first * middle
    straight = bent + left * first - middle
    if straight <= 0:
        return None
    own = bent / straight  # half-way, the time of `times` is then half as well
    at = times(steps, sigmas, own)
    even = all(abs(time - step / steps) < EVEN for step, time in enumerate(at))
    return own if even else None


def widest_gaps(schedule: Schedule, at: Sequence[float]) -> dict[int, float]:
    """Skipped step -> the wider of the gap between full steps that it lies in and the one before,
    with the S + 1 places `at`."""
    found: dict[int, float] = {}
    before = 0.0
    for full, after in pairwise((*schedule.full_steps, schedule.steps)):
        gap = at[after] - at[full]
        found |= dict.fromkeys(range(full + 1, after), max(gap, before))
        before = gap
    return found


@lru_cache(maxsize=8)
def _cumulative(early: float, late: float) -> tuple[float, ...]:
    """The integral of y^early (1 - y)^late up to each of `_CELLS` + 1 places, 1 at the last."""
    middles = ((cell + 0.5) / _CELLS for cell in range(_CELLS))
    sums = [0.0, *accumulate(y**early * (1 - y) ** late for y in middles)]
    return tuple(value / sums[-1] for value in sums)


def _quantile(share: float, early: float, late: float) -> float:
    """The time at which this share of the full steps is behind."""
    known = _cumulative(early, late)
    cell = min(int(share * _CELLS), _CELLS - 1)
    return known[cell] + (share * _CELLS - cell) * (known[cell + 1] - known[cell])


def _place(time: float, at: Sequence[float]) -> float:
    """The fractional step at which a run has come to this time."""
    step = min(bisect_right(at, time), len(at) - 1) - 1
    return step + (time - at[step]) / (at[step + 1] - at[step])
