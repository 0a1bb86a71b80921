"""Training-free forecasters with the rules that their authors publish for the full steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lesa.core.schedule import Schedule
from lesa.evaluation.method import Bench, Method
from lesa.forecasters.foca import FoCa
from lesa.forecasters.hicache import HiCache
from lesa.forecasters.reuse import Reuse
from lesa.forecasters.spectrum import Spectrum
from lesa.forecasters.taylor import Taylor


@dataclass(frozen=True)
class ScheduledPeer:
    """A training-free forecaster and its family of schedules.

    The rule maps a setting, 1 to the number of steps in fractions of `grid`, to a schedule;
    `published` are the settings that its authors report.
    """

    forecaster: Callable[[], Any]
    rule: Callable[[Any], Schedule]
    published: tuple[float, ...]
    grid: int = 1

    takes_lists = True

    def unfit(self, bench: Bench) -> str | None:
        """It runs on every pipeline."""
        return None

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """At its own rule: the setting whose number of full steps is nearest to, but not below,
        the wanted one (the doubt goes to the peer)."""
        if searched is not None:
            schedule = searched.bind(bench.num_steps)
            return Method(name, bench.num_steps, self.forecaster(), schedule, "searched")
        schedule = self.nearest(wanted, bench.num_steps)
        return Method(name, bench.num_steps, self.forecaster(), schedule)

    def nearest(self, wanted: int, num_steps: int) -> Schedule:
        """The schedule with the fewest full steps that are not below `wanted`.

        Among equal counts a published setting wins (TaylorSeer's 8 of 50 is interval 9, not 8),
        then the smallest, whose gaps are the most even.
        """
        bound = {setting: self.rule(setting).bind(num_steps) for setting in self._tried(num_steps)}
        enough = {k: s for k, s in bound.items() if len(s.full_steps) >= wanted}
        if not enough:  # Spectrum's densest setting still skips
            return Schedule.explicit(range(num_steps), num_steps)
        best = min(enough, key=lambda k: (len(enough[k].full_steps), k not in self.published, k))
        return enough[best]

    def _tried(self, num_steps: int) -> tuple[float, ...]:
        tried = range(1, self.grid * num_steps + 1)
        return tuple(i if self.grid == 1 else i / self.grid for i in tried)


_TAYLOR = (4, 5, 6, 7, 9)
FORECASTERS: dict[str, ScheduledPeer] = {
    "fora": ScheduledPeer(Reuse, Schedule.fora, (3, 5, 7)),
    "taylorseer-0": ScheduledPeer(lambda: Taylor(order=0), Schedule.taylorseer, _TAYLOR),
    "taylorseer-1": ScheduledPeer(lambda: Taylor(order=1), Schedule.taylorseer, _TAYLOR),
    "taylorseer-2": ScheduledPeer(lambda: Taylor(order=2), Schedule.taylorseer, _TAYLOR),
    "hicache": ScheduledPeer(lambda: HiCache(order=2, sigma=0.5), Schedule.taylorseer, _TAYLOR),
    "foca": ScheduledPeer(FoCa, Schedule.taylorseer, _TAYLOR),
    "spectrum": ScheduledPeer(Spectrum, Schedule.spectrum, (0.75, 2, 3, 4), grid=4),
}
