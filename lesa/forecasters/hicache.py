"""TaylorSeer's differences weighed by scaled Hermite polynomials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import factorial

from lesa.core.checks import real, whole
from lesa.core.forecaster import Tap
from lesa.core.schedule import Schedule
from lesa.core.table import Table
from lesa.errors import LesaError
from lesa.forecasters.taylor import MAX_ORDER, difference_table


@dataclass(frozen=True)
class HiCache:
    """h_hat_s = sum_i F_i sigma^i H_i(sigma k) / i!, k = s - p, F_i as in `Taylor`.

    H_0 = 1, H_1 = 2x, H_{n+1} = 2x H_n - 2n H_{n-1} (physicists' Hermite polynomials).
    Raises LesaError for an order outside 0..4 or a sigma that is not positive.
    Source: HiCache (arXiv 2508.16984).
    """

    order: int = 2
    sigma: float = 0.5
    tap: Tap | None = None

    uses_latent = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", whole("order", self.order, 0, MAX_ORDER))
        sigma = real("sigma", self.sigma, "HiCache publishes 0.5 to 0.7")
        if sigma <= 0:
            raise LesaError(f"sigma={sigma:g}: not above 0; HiCache publishes 0.5 to 0.7")
        object.__setattr__(self, "sigma", sigma)

    @property
    def name(self) -> str:
        """ "hicache" of the published order 2, else "hicache-" and the order."""
        return "hicache" if self.order == 2 else f"hicache-{self.order}"

    def history(self, schedule: Schedule) -> int:
        """order + 1 features, or all full steps where there are fewer."""
        return min(self.order + 1, len(schedule.full_steps))

    def table(
        self, schedule: Schedule, sigmas: Sequence[float] = (), branch: str = "cond"
    ) -> Table:
        """The forecast as coefficients; steps are the unit, `sigmas` are not used."""
        return difference_table(schedule, self.order, self._weight)

    def _weight(self, i: int, k: int) -> float:
        return self.sigma**i * hermite(i, self.sigma * k) / factorial(i)


def hermite(n: int, x: float) -> float:
    """The physicists' Hermite polynomial H_n(x)."""
    before, now = 0.0, 1.0
    for i in range(n):
        before, now = now, 2 * x * now - 2 * i * before
    return now
