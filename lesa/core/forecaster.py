"""What every forecaster offers: a table for a schedule and its noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

from lesa.core.checks import reals, shown
from lesa.core.schedule import Schedule
from lesa.core.table import Table
from lesa.errors import LesaError

Tap = Literal["hidden", "output"]


@runtime_checkable
class Forecaster(Protocol):
    """Turns (schedule, sigmas, guidance branch) into a Table; never sees a model or a pipeline."""

    @property
    def name(self) -> str:
        """Short name for reports."""

    @property
    def uses_latent(self) -> bool:
        """Is the current latent one more regressor?"""

    @property
    def tap(self) -> Tap | None:
        """The feature it was made for, None when any will do."""

    def history(self, schedule: Schedule) -> int:
        """K, the number of features that the ring holds for this bound schedule."""

    def table(self, schedule: Schedule, sigmas: Sequence[float], branch: str = "cond") -> Table:
        """Coefficients for a bound schedule; `sigmas` are the S + 1 noise levels in [0, 1]."""


def check_sigmas(schedule: Schedule, sigmas: Sequence[float]) -> tuple[float, ...]:
    """The S + 1 noise levels as floats.

    Raises LesaError when they are not numbers, when there are not the schedule's steps + 1 of them,
    or when the levels do not strictly decrease within [0, 1].
    """
    levels = reals("sigmas", sigmas, "pass the noise levels of the run")
    steps = schedule.steps
    if len(levels) != steps + 1:
        raise LesaError(
            f"sigmas={len(levels)} values: a schedule of {steps} steps needs {steps + 1}; "
            "pass the noise level at the start of every step and at the end"
        )
    decreasing = all(a > b for a, b in zip(levels, levels[1:], strict=False))
    if not decreasing or levels[0] > 1 + 1e-6 or levels[-1] < -1e-6:
        found = shown([round(level, 4) for level in levels])
        raise LesaError(
            f"sigmas={found}: they do not strictly decrease within [0, 1]; map "
            "variance-exploding levels by sigma / (1 + sigma)"
        )
    return levels
