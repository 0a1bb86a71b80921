"""Forecast, then calibrate: a BDF2 predictor and a Heun corrector along the cached features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lesa.core.forecaster import Tap
from lesa.core.schedule import Schedule
from lesa.core.table import Table

HORIZON = 3  # steps that a straight line is trusted for


@dataclass(frozen=True)
class FoCa:
    """h_hat_s = h_p + r_k / 2 (d + d_s), k = s - p, d = (h_p - h_q) / (p - q).

    p and q are the last two full steps. d_s is the slope at s that the BDF2 predictor tells:
    F_{n+1} = (4 F_n - F_{n-1} + 2 F'_{n+1}) / 3 over the two newest values, forecasts included,
    with their own slope for F', is the straight line through them. Heun's rule takes the mean of
    both slopes from the full step on. The reach r_k is k up to 3 steps and 9 / k beyond, which
    pulls long forecasts back to h_p. Straight lines are exact up to k = 3; one full step is reuse.
    Source: FoCa (arXiv 2508.16211), in steps as the unit of the slopes.
    """

    tap: Tap | None = None

    uses_latent = False
    name = "foca"

    def history(self, schedule: Schedule) -> int:
        """Two features, or one where there is one full step."""
        return min(2, len(schedule.full_steps))

    def table(
        self, schedule: Schedule, sigmas: Sequence[float] = (), branch: str = "cond"
    ) -> Table:
        """The recursion in closed form: h_p + c_k d; `sigmas` are not used."""
        distances = _distances(schedule.steps)

        def row(step: int, cached: tuple[int, ...]) -> list[float]:
            if len(cached) < 2:
                return [1.0]
            last, before = cached
            share = distances[step - last] / (last - before)
            return [1 + share, -share]

        return Table.from_rows(schedule, self.history(schedule), row)


def _distances(steps: int) -> list[float]:
    """c_k in units of d for k = 0, 1, ...: each forecast's slope rests on the two before it."""
    found = [-1.0, 0.0]  # where the straight line was a step ago, and where it is at p
    for k in range(1, steps):
        reach = k if k <= HORIZON else HORIZON**2 / k
        found.append(reach / 2 * (1 + found[-1] - found[-2]))
    return found[1:]
