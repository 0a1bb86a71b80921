"""Extrapolation in the step index by finite differences of the full steps' features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import factorial, prod

from lesa.core.checks import shown, whole
from lesa.core.forecaster import Tap
from lesa.core.schedule import Schedule
from lesa.core.table import Table
from lesa.errors import LesaError

MAX_ORDER = 4


@dataclass(frozen=True)
class Taylor:
    """h_hat_s = sum_i F_i k^i / i!, k = s - p, over the differences of TaylorSeer.

    At a full step s with the full step p before it, F_0 = h_s and
    F_{i+1} = (F_i new - F_i old) / (s - p) for every F_i old that exists; with one full step this
    is reuse. These one-sided differences make order 1 exact on straight lines, but order 2 misses
    a parabola by h'' k d / 2 (d = the last gap). `exact=True` takes the polynomial through the
    newest `order` + 1 features instead (Lagrange), which has no such error.
    Raises LesaError for an order outside 0..4, or an `exact` that is no truth value. Source:
    TaylorSeer (arXiv 2503.06923), eq. 3.
    """

    order: int = 1
    exact: bool = False
    tap: Tap | None = None

    uses_latent = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", whole("order", self.order, 0, MAX_ORDER))
        if not isinstance(self.exact, bool):
            raise LesaError(f"exact={shown(self.exact)}: neither True nor False; give one of them")

    @property
    def name(self) -> str:
        """ "taylor-" and the order, "-exact" behind it for the polynomial."""
        return f"taylor-{self.order}{'-exact' if self.exact else ''}"

    def history(self, schedule: Schedule) -> int:
        """order + 1 features, or all full steps where there are fewer."""
        return min(self.order + 1, len(schedule.full_steps))

    def table(
        self, schedule: Schedule, sigmas: Sequence[float] = (), branch: str = "cond"
    ) -> Table:
        """The same extrapolation as coefficients; steps are the unit, `sigmas` are not used."""
        if self.exact:
            return Table.from_rows(schedule, self.history(schedule), lagrange)
        return difference_table(schedule, self.order, lambda i, k: k**i / factorial(i))


def difference_table(schedule: Schedule, order: int, weight: Callable[[int, int], float]) -> Table:
    """The table of h_hat_s = sum_i weight(i, s - p) F_i over TaylorSeer's differences F_i."""
    differences = finite_differences(schedule.full_steps, order)

    def row(step: int, cached: tuple[int, ...]) -> list[float]:
        total = [0.0] * len(cached)
        for i, difference in enumerate(differences[cached[0]]):
            for k, value in enumerate(difference):
                total[k] += weight(i, step - cached[0]) * value
        return total

    return Table.from_rows(schedule, min(order + 1, len(schedule.full_steps)), row)


def finite_differences(full_steps: Sequence[int], order: int) -> dict[int, list[list[float]]]:
    """F_0..F_order at each full step; F_i holds i + 1 weights on the features, newest first."""
    result: dict[int, list[list[float]]] = {}
    old: list[list[float]] = []
    for n, step in enumerate(full_steps):
        new = [[1.0]]
        for before in old[:order]:
            gap = step - full_steps[n - 1]
            pairs = zip([*new[-1], 0.0], [0.0, *before], strict=True)
            new.append([(a - b) / gap for a, b in pairs])
        result[step] = old = new
    return result


def lagrange(step: int, cached: Sequence[int]) -> list[float]:
    """Weights of the polynomial through the cached steps, evaluated at `step`."""
    return [prod((step - q) / (p - q) for q in cached if q != p) for p in cached]
