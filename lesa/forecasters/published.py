"""Training-free methods by name: each a forecaster and the full steps that its authors publish.

This is the only place that says which steps such a method computes in full: `LesaConfig`,
`lesa generate` and `lesa compare` all ask here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lesa.core.forecaster import Forecaster
from lesa.core.schedule import Schedule
from lesa.forecasters.foca import FoCa
from lesa.forecasters.hicache import HiCache
from lesa.forecasters.prior import Prior, Shape, prior_schedule
from lesa.forecasters.reuse import Reuse
from lesa.forecasters.spectrum import Spectrum
from lesa.forecasters.taylor import Taylor


@dataclass(frozen=True)
class FullStepRule:
    """A published family of schedules, one for each setting.

    Attributes:
        schedule: Makes the schedule of a setting.
        published: The settings that the authors report.
        grid: Settings are 1 / grid, 2 / grid, ... up to the number of steps.
    """

    schedule: Callable[[Any], Schedule]
    published: tuple[float, ...]
    grid: int = 1

    def nearest(
        self, wanted: int, num_steps: int, sigmas: Sequence[float] | None = None
    ) -> Schedule:
        """The schedule with the fewest full steps that are not below `wanted`, whatever `sigmas`.

        Among equal counts a published setting wins (TaylorSeer's 8 of 50 is interval 9, not 8),
        then the smallest, whose gaps are the most even.
        """
        whole = range(1, self.grid * num_steps + 1)
        tried = whole if self.grid == 1 else [i / self.grid for i in whole]
        bound = {setting: self.schedule(setting).bind(num_steps) for setting in tried}
        enough = {k: s for k, s in bound.items() if len(s.full_steps) >= wanted}
        if not enough:  # Spectrum's densest setting still skips
            return Schedule.explicit(range(num_steps), num_steps)
        best = min(enough, key=lambda k: (len(enough[k].full_steps), k not in self.published, k))
        return enough[best]


@dataclass(frozen=True)
class PriorRule:
    """lesa's own lists where nothing was trained: every count has one, by the noise levels."""

    shape: Shape

    def nearest(
        self, wanted: int, num_steps: int, sigmas: Sequence[float] | None = None
    ) -> Schedule:
        """`prior_schedule`."""
        return prior_schedule(wanted, num_steps, sigmas, self.shape)


FORA = FullStepRule(Schedule.fora, (3, 5, 7))
TAYLORSEER = FullStepRule(Schedule.taylorseer, (4, 5, 6, 7, 9))
SPECTRUM = FullStepRule(Schedule.spectrum, (0.75, 2, 3, 4), grid=4)
LESA_PAPER = FullStepRule(Schedule.every, (5, 7, 10))  # of the trained form alone

_RULES: dict[type, FullStepRule] = {
    Reuse: FORA,
    Taylor: TAYLORSEER,
    HiCache: TAYLORSEER,
    FoCa: TAYLORSEER,
    Spectrum: SPECTRUM,
}
METHODS: dict[str, Callable[[], Forecaster]] = {
    "lesa-untrained": Prior,
    "fora": Reuse,
    "taylor-0": partial(Taylor, order=0),
    "taylor-1": partial(Taylor, order=1),
    "taylor-2": partial(Taylor, order=2),
    "hicache": partial(HiCache, order=2, sigma=0.5),
    "foca": FoCa,
    "spectrum": Spectrum,
}
ALIASES = {
    "reuse": "fora",
    "taylorseer-0": "taylor-0",
    "taylorseer-1": "taylor-1",
    "taylorseer-2": "taylor-2",
    "hicache-2": "hicache",
}


def canonical(name: str) -> str:
    """The name that reports use for a method; any other text comes back unchanged."""
    return ALIASES.get(name, name)


def rule_of(forecaster: Any) -> FullStepRule | PriorRule | None:
    """The rule that a forecaster's authors publish, None where there is none."""
    if isinstance(forecaster, Prior):
        return PriorRule(forecaster.shape)
    return next((rule for kind, rule in _RULES.items() if isinstance(forecaster, kind)), None)
