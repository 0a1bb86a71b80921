"""Chebyshev ridge regression over all full steps so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lesa.core.checks import real, whole
from lesa.core.forecaster import Tap
from lesa.core.schedule import Schedule
from lesa.core.table import Table
from lesa.errors import LesaError
from lesa.forecasters.taylor import lagrange


@dataclass(frozen=True)
class Spectrum:
    """h_hat_s = weight * fit + (1 - weight) * linear.

    fit: ridge regression of all features so far on T_0..T_degree(x), x = 2 s / S - 1;
    linear: the straight line in the step through the last two full steps (reuse with one).
    The ring holds every full step. Raises LesaError for degree < 1, ridge <= 0 or a weight outside
    [0, 1]. Source: Spectrum (arXiv 2603.01623).
    """

    degree: int = 4
    ridge: float = 0.1
    weight: float = 0.5
    tap: Tap | None = None

    uses_latent = False
    name = "spectrum"

    def __post_init__(self) -> None:
        ridge = real("ridge", self.ridge, "the usual value is 0.1")
        weight = real("weight", self.weight, "use 0.5 to 1")
        if ridge <= 0:
            raise LesaError(f"ridge={ridge:g}: not above 0; the usual value is 0.1")
        if not 0 <= weight <= 1:
            raise LesaError(f"weight={weight:g}: not in [0, 1]; use 0.5 to 1")
        known = {"degree": whole("degree", self.degree, 1), "ridge": ridge, "weight": weight}
        for name, value in known.items():
            object.__setattr__(self, name, value)

    def history(self, schedule: Schedule) -> int:
        """As many features as full steps come before the last skipped step."""
        last = max(schedule.skipped_steps, default=1)
        return max(len(schedule.cached_before(last, last)), 1)

    def table(
        self, schedule: Schedule, sigmas: Sequence[float] = (), branch: str = "cond"
    ) -> Table:
        """Both parts as coefficients over all cached steps; `sigmas` are not used."""
        steps = schedule.steps

        def row(step: int, cached: tuple[int, ...]) -> list[float]:
            places = torch.tensor([*cached, step], device="cpu")
            *_, target = basis = chebyshev(places, steps, self.degree)  # [n + 1, degree + 1]
            design = basis[:-1]
            gram = design.T @ design
            gram.diagonal().add_(self.ridge)
            weights = self.weight * (design @ torch.linalg.solve(gram, target))
            line = lagrange(step, cached[:2])
            weights[: len(line)] += (1 - self.weight) * weights.new_tensor(line)
            return weights.tolist()

        return Table.from_rows(schedule, self.history(schedule), row)


def chebyshev(steps: Tensor, num_steps: int, degree: int) -> Tensor:
    """T_0..T_degree at x = 2 s / S - 1 for steps [n]: float64 [n, degree + 1]."""
    x = steps.double() * 2 / num_steps - 1
    columns = [torch.ones_like(x), x]
    for _ in range(degree - 1):
        columns.append(2 * x * columns[-1] - columns[-2])
    return torch.stack(columns[: degree + 1], dim=1)
