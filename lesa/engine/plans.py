"""What each budget means on one pipeline: a configuration and its tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from lesa.engine.config import LesaConfig
from lesa.engine.doubts import doubts_of_count
from lesa.engine.options import Options
from lesa.engine.step_tables import StepTables
from lesa.errors import LesaError, RunError
from lesa.hooks.step_clock import Step
from lesa.util.warn import warn

__all__ = ["Plan", "Plans"]

_MAX_PLANS = 32


class Plan(NamedTuple):
    """A budget: the configuration that it makes of the pipeline's, and its tables.

    `own` tells a budget that a request brought from the one that the pipeline was enabled with.
    """

    config: LesaConfig
    tables: StepTables
    own: bool = False

    def check_run(self, step: Step) -> None:
        """RunError where the run that begins contradicts the budget."""
        config, count = self.config, self.config.full_steps
        config.check_run(step.num_steps, step.branch, step.sigmas)
        if self.own and count is not None and count > step.num_steps:
            try:
                config.bound_schedule(step.num_steps, step.sigmas)
            except LesaError as error:
                raise RunError(str(error)) from None


class Plans:
    """The plans of one controller, remembered by budget.

    Args:
        config: what the pipeline was enabled with.
        check: raises a LesaError for a configuration that does not serve the model.
    """

    def __init__(self, config: LesaConfig, check: Callable[[LesaConfig], None]) -> None:
        self.default = Plan(config, StepTables(config))
        self._check = check
        self._known: dict[Options, Plan] = {}

    def of(self, asked: Options | None) -> Plan:
        """The plan of a budget; warns, once, of a count that was not trained.

        Raises:
            LesaError: the forecaster has no such count, or cannot reach the target.
        """
        if asked is None or not asked.asked:
            return self.default
        found = self._known.get(asked)
        if found is None:
            config = replace(self.default.config, schedule=None, **asked.asked)
            self._check(config)
            for doubt in doubts_of_count(config):
                warn(doubt)
            found = Plan(config, StepTables(config), own=True)
            if len(self._known) >= _MAX_PLANS:
                self._known.clear()
            self._known[asked] = found
        return found
