"""Which steps of a run are full, from what the user asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from lesa.core.forecaster import Forecaster
from lesa.core.schedule import Schedule, spread
from lesa.errors import LesaError
from lesa.forecasters.calibration import count_on
from lesa.forecasters.prior import Prior, default_count, quality_count
from lesa.forecasters.published import rule_of
from lesa.forecasters.target import Target
from lesa.forecasters.worth import speedup

__all__ = ["Choice", "by_count", "by_default", "by_target"]

_DEFAULT_INTERVAL = 5


class Choice(NamedTuple):
    """A schedule bound to a run; `why` says for which target it was chosen, if for one."""

    schedule: Schedule
    why: str = ""


def by_count(
    forecaster: Forecaster, count: int, num_steps: int, sigmas: Sequence[float] | None
) -> Choice:
    """So many full steps: as calibrated, as the forecaster's authors do it, or nearly even; a
    LesaError where the run is shorter."""
    if count > num_steps:
        raise LesaError(
            f"full_steps={count}: the run has {num_steps} steps; give at most {num_steps}"
        )
    if getattr(forecaster, "calibrated", []):
        return Choice(cast(Any, forecaster).schedule_for(count, num_steps, sigmas))
    if (rule := rule_of(forecaster)) is not None:
        return Choice(rule.nearest(count, num_steps, sigmas))
    return Choice(_even(count, num_steps))


def by_target(
    forecaster: Forecaster, target: Target, num_steps: int, sigmas: Sequence[float] | None
) -> Choice:
    """The calibrated count that reaches a target, or by S / |A| alone where nothing was calibrated;
    a LesaError where none does."""
    calibrations = getattr(forecaster, "calibrations", [])
    if calibrations:
        count, why = target.choose(calibrations, num_steps, sigmas)
        return by_count(forecaster, count, num_steps, sigmas)._replace(why=why)
    target.check(forecaster)
    if target.quality is not None:  # of the prior, which nobody measured here
        count = quality_count(num_steps, target.quality)
        return by_count(forecaster, count, num_steps, sigmas)._replace(why=f"{target}, untrained")
    wanted = cast(float, target.speedup)
    times = 1.0
    for count in range(max(1, int(num_steps / wanted + 1e-9)), 0, -1):  # a rule may have none of it
        schedule = by_count(forecaster, count, num_steps, sigmas).schedule
        times = speedup(len(schedule.full_steps), num_steps)
        if times >= wanted - 1e-9:
            return Choice(schedule, f"{target}, {times:.2f} if a skipped step takes no time")
    raise LesaError(
        f"{target}: {forecaster.name} makes {num_steps} steps at most {times:.3g} times faster; "
        "ask for less, or run more steps"
    )


def by_default(forecaster: Forecaster, num_steps: int, sigmas: Sequence[float] | None) -> Choice:
    """What is run where nothing was asked for."""
    calibrated = getattr(forecaster, "calibrated", [])
    if calibrated:
        return by_count(forecaster, count_on(calibrated[0], num_steps), num_steps, sigmas)
    if isinstance(forecaster, Prior):
        return by_count(forecaster, default_count(num_steps), num_steps, sigmas)
    return Choice(Schedule.every(_DEFAULT_INTERVAL, num_steps))


def _even(count: int, num_steps: int) -> Schedule:
    """The paper's rule with `count` full steps, else steps as evenly spaced as possible."""
    for interval in range(1, num_steps + 1):
        schedule = Schedule.every(interval, num_steps)
        if len(schedule.full_steps) == count:
            return schedule
    places = [i * num_steps / count for i in range(count)]
    return Schedule.explicit(spread(places, num_steps), num_steps)
