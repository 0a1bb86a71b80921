"""Which numbers of full steps the page offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lesa.core.checks import whole
from lesa.core.schedule import check_count
from lesa.errors import LesaError
from lesa.forecasters.prior import default_count

__all__ = ["Counts", "counts_of"]


@dataclass(frozen=True)
class Counts:
    """The numbers of full steps of a run of `num_steps` steps that can be asked for.

    `trained` holds those that a forecaster was trained for, ascending; empty where every number
    from 1 to `num_steps` is served.
    """

    num_steps: int
    trained: tuple[int, ...] = ()

    @property
    def default(self) -> int:
        """The one nearest to a fifth of the steps."""
        if self.trained:
            return self.nearest(self.num_steps / 5)
        return default_count(self.num_steps)

    @property
    def ends(self) -> tuple[int, int]:
        """The first and the last one."""
        return (self.trained[0], self.trained[-1]) if self.trained else (1, self.num_steps)

    def nearest(self, wanted: float) -> int:
        """The one that is nearest, of two the larger."""
        offered: Sequence[int] = self.trained or range(1, self.num_steps + 1)
        return min(offered, key=lambda count: (abs(count - wanted), -count))

    def moved(self, count: Any) -> int:
        """Where a slider that was moved to `count` stops; LesaError where it is at no step."""
        return self.nearest(self._possible(count, "full steps"))

    def check(self, count: Any, field: str) -> int:
        """`count` as an int; LesaError where it is not offered."""
        found = self._possible(count, field)
        if self.trained and found not in self.trained:
            listed = " or ".join(map(str, self.trained))
            raise LesaError(f"{field}={found}: the forecaster is not trained for it; give {listed}")
        return found

    def _possible(self, count: Any, field: str) -> int:
        found = whole(field, count, 1)
        check_count(found, self.num_steps, field)
        return found


def counts_of(forecaster: Any, num_steps: int) -> Counts:
    """What a forecaster offers for runs of so many steps.

    Of one that was trained, the lists of this number of steps come before those of others; a
    training-free one serves every number.

    Raises: LesaError where it was trained for more full steps than a run has.
    """
    calibrated = list(getattr(forecaster, "calibrated", ()))
    same = [schedule for schedule in calibrated if schedule.steps == num_steps]
    found = {len(schedule.full_steps) for schedule in same or calibrated}
    fitting = tuple(sorted(count for count in found if count <= num_steps))
    if found and not fitting:
        raise LesaError(
            f"num-inference-steps={num_steps}: the forecaster was trained for"
            f" {min(found)} full steps or more; give at least {min(found)}"
        )
    return Counts(num_steps, fitting)
