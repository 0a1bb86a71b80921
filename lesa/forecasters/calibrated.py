"""What is calibrated of a learned forecaster: step lists with their rows, by run and branch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lesa.core.forecaster import check_sigmas
from lesa.core.schedule import Schedule
from lesa.core.table import Table
from lesa.errors import LesaError
from lesa.forecasters.calibration import (
    SIGMA_TOLERANCE,
    Calibration,
    extended,
    schedule_for,
)
from lesa.forecasters.continuous import TableForm
from lesa.forecasters.damping import Rows
from lesa.forecasters.disca import DiscaForm
from lesa.forecasters.kan import FullPrecision
from lesa.forecasters.paper import PaperForm
from lesa.forecasters.settings import Settings

__all__ = ["Calibrated"]


class Calibrated(FullPrecision):
    """The calibrations of a `LesaForecaster`, and what is asked of them.

    Attributes:
        settings: of the forecaster.
        net: its form.
        calibrations: the lists, in the order in which they were calibrated.
    """

    settings: Settings
    net: TableForm | PaperForm
    calibrations: list[Calibration]

    @property
    def form(self) -> str:
        """ "continuous", "disca", "paper" or "table"."""
        return self.settings.form

    @property
    def uses_latent(self) -> bool:
        """Is the current latent one more regressor (last column)?"""
        return bool(self.settings.uses_latent)

    @property
    def branches(self) -> tuple[str, ...]:
        """The guidance branches that have parameters of their own."""
        return self.settings.branches

    def branch(self, asked: str) -> str:
        """The stored branch for an asked one; "cond" and "default" stand for each other."""
        for name in (asked, {"cond": "default", "default": "cond"}.get(asked)):
            if name in self.branches:
                return name
        raise LesaError(
            f"branch={asked!r} was not trained, only {', '.join(map(repr, self.branches))}; "
            "train with this guidance, or run without it"
        )

    def correct(
        self,
        schedule: Schedule,
        sigmas: Sequence[float],
        branch: str,
        coefficients: Tensor,
        split: Tensor | None = None,
    ) -> None:
        """Makes `table(schedule, sigmas, branch)` return exactly these rows [S, K + uses_latent],
        and for batched guidance parts `split` [S, K + uses_latent, P].

        Raises LesaError in the paper form or when the rows do not make a valid Table.
        """
        if self.form == "paper":
            raise LesaError(
                "form='paper': it holds no calibrated rows; use 'continuous' or 'table'"
            )
        branch = self.branch(branch)
        table = Table(schedule, coefficients, self.uses_latent, split=split)
        if table.history != self.net.history:
            raise LesaError(
                f"coefficients={list(table.coefficients.shape)}: they weigh {table.history} "
                f"features, and history={self.net.history}; fit rows of that width"
            )
        entry = self.recommend(schedule, sigmas)
        entry.rows[branch] = table.coefficients
        entry.worth = entry.guard = None  # were measured with other rows, if at all
        entry.split.pop(branch, None)
        if table.split is not None:
            entry.split[branch] = table.split

    def recommend(self, schedule: Schedule, sigmas: Sequence[float]) -> Calibration:
        """Records a bound schedule as calibrated, with or without rows; known ones are kept."""
        levels = check_sigmas(schedule, sigmas)
        entry = self.calibration(schedule, levels)
        if entry is None:
            entry = Calibration(schedule, levels)
            self.calibrations.append(entry)
        return entry

    def calibration(self, schedule: Schedule, sigmas: Sequence[float]) -> Calibration | None:
        """The entry of this schedule and these noise levels (within 1e-4), if there is one."""
        return next((c for c in self.calibrations if c.matches(schedule, sigmas)), None)

    @property
    def calibrated(self) -> list[Schedule]:
        """The schedules it was calibrated on, without repeats."""
        return list(dict.fromkeys(entry.schedule for entry in self.calibrations))

    def schedule_for(
        self, full_steps: int, num_steps: int, sigmas: Sequence[float] | None = None
    ) -> Schedule:
        """The calibrated schedule of that count; see `calibration.schedule_for`."""
        if isinstance(self.net, DiscaForm):
            self.net.check_count(full_steps, self.calibrated)
        return schedule_for(self.calibrations, full_steps, num_steps, sigmas)

    def _fitted(self, schedule: Schedule, levels: tuple[float, ...], branch: str) -> Rows | None:
        """Rows that were fitted to this run, full steps added or not, or to what a guard runs."""
        entry = self.calibration(schedule, levels)
        if entry is not None and branch in entry.rows:
            return Rows(entry.rows[branch], entry.split.get(branch))
        for entry in self.calibrations:
            guard = entry.guard
            if guard is None or branch not in guard.rows or guard.schedule != schedule:
                continue
            if entry.distance(levels) <= SIGMA_TOLERANCE:
                return Rows(guard.rows[branch], guard.split.get(branch))
        added = extended(self.calibrations, schedule, levels, branch, self.net.history)
        return None if added is None else Rows(*added)
