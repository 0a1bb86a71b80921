"""Reuse of the last full step's feature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lesa.core.forecaster import Tap
from lesa.core.schedule import Schedule
from lesa.core.table import Table


@dataclass(frozen=True)
class Reuse:
    """h_hat_s = h_p, p the last full step. Source: FORA (arXiv 2407.01425)."""

    tap: Tap | None = None

    uses_latent = False
    name = "fora"

    def history(self, schedule: Schedule) -> int:
        """One feature."""
        return 1

    def table(
        self, schedule: Schedule, sigmas: Sequence[float] = (), branch: str = "cond"
    ) -> Table:
        """Weight 1 on the newest feature at every skipped step; `sigmas` are not used."""
        return Table.from_rows(schedule, 1, lambda step, cached: [1.0])
