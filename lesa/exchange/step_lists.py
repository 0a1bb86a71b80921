"""What of a forecaster other programs are given: calibrated step lists, and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.core.table import Table
from lesa.errors import LesaError
from lesa.forecasters.calibration import Calibration
from lesa.forecasters.lesa import LesaForecaster

__all__ = ["StepList", "step_lists"]


@dataclass(frozen=True)
class StepList:
    """A list of full steps of one forecaster, with what it was calibrated to."""

    forecaster: LesaForecaster
    entry: Calibration

    @property
    def steps(self) -> int:
        """S, of the run."""
        return self.entry.schedule.steps

    @property
    def full_steps(self) -> tuple[int, ...]:
        """In increasing order."""
        return self.entry.schedule.full_steps

    @property
    def name(self) -> str:
        """ "10-of-50"."""
        return f"{len(self.full_steps)}-of-{self.steps}"

    @property
    def metadata(self) -> dict[str, Any]:
        """Where the forecaster comes from."""
        return self.forecaster.metadata

    def table(self, branch: str, schedule: Schedule | None = None) -> Table:
        """What lesa runs of it, or of the list that its guard changes to, in a guidance branch."""
        return self.forecaster.table(schedule or self.entry.schedule, self.entry.sigmas, branch)

    def gram(self) -> Tensor | None:
        """Mean inner products of the first branch's outputs at its steps: float64 [S, S]; None
        where training kept none."""
        branch = self.forecaster.branches[0]
        return self.forecaster.moments.at(branch, self.entry.sigmas[:-1], latent=False)


def step_lists(
    forecaster: LesaForecaster, full_steps: Sequence[int] | None = None
) -> list[StepList]:
    """The calibrated lists, or those with so many full steps; LesaError where there is none."""
    found = [StepList(forecaster, entry) for entry in forecaster.calibrations]
    if not found:
        raise LesaError(
            "calibrated=[]: the forecaster has no step list; train it, or record one with "
            "recommend(schedule, sigmas)"
        )
    if full_steps is None:
        return found
    known = [len(one.full_steps) for one in found]
    for count in full_steps:
        if count not in known:
            listed = ", ".join(map(str, sorted(set(known), reverse=True)))
            raise LesaError(
                f"full-steps={count}: not calibrated, only {listed}; choose from these or train "
                "with that count"
            )
    return [one for one, count in zip(found, known, strict=True) if count in full_steps]
