"""Training-free forecasters with the rules that their authors publish for the full steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lesa.core.forecaster import Forecaster
from lesa.core.schedule import Schedule
from lesa.evaluation.method import Bench, Method
from lesa.forecasters.prior import Prior
from lesa.forecasters.published import METHODS, rule_of


@dataclass(frozen=True)
class ScheduledPeer:
    """A training-free forecaster, run by the rule of `lesa.forecasters.published`."""

    forecaster: Callable[[], Forecaster]

    takes_lists = True

    def unfit(self, bench: Bench) -> str | None:
        """It runs on every pipeline."""
        return None

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """At its own rule: the setting whose number of full steps is nearest to, but not below,
        the wanted one (ties favour the peer)."""
        forecaster = self.forecaster()
        if searched is not None:
            schedule = searched.bind(bench.num_steps)
            return Method(name, bench.num_steps, forecaster, schedule, "searched")
        rule = rule_of(forecaster)
        assert rule is not None  # every published method has one
        return Method(name, bench.num_steps, forecaster, rule.nearest(wanted, bench.num_steps))


FORECASTERS = {
    name: ScheduledPeer(forecaster) for name, forecaster in METHODS.items() if name != Prior.name
}
