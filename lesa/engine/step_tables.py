"""Where the step path gets its tables, and what the user is told of them."""

from __future__ import annotations

from typing import Any

from lesa.core.forecaster import Forecaster
from lesa.core.schedule import Schedule
from lesa.core.table import Table
from lesa.engine.config import LesaConfig
from lesa.engine.step_table import Guarded, StepTable
from lesa.errors import LesaError
from lesa.forecasters.config_check import LARGEST_SUM, largest_sum
from lesa.forecasters.lesa import LesaForecaster
from lesa.forecasters.mismatch import Excess
from lesa.forecasters.prior import Prior
from lesa.hooks.generation import Generation
from lesa.hooks.scheduler_advice import other_size
from lesa.hooks.step_clock import Step
from lesa.util.warn import warn

__all__ = ["StepTables", "needs_levels"]

_MAX_TABLES = 64


def needs_levels(forecaster: Forecaster) -> bool:
    """Whether a forecaster goes by noise levels: it has no table without them."""
    try:
        forecaster.table(Schedule.explicit([0], 2), ())
    except Exception:
        return True
    return False


class StepTables:
    """Asks the forecaster for tables and remembers them."""

    def __init__(self, config: LesaConfig) -> None:
        self._config = config
        self._tables: dict[tuple[Any, ...], StepTable | str] = {}
        self._told: set[str] = set()

    def schedule(self, step: Step) -> Schedule:
        """The schedule of the whole run that `step` belongs to; LesaError where there is none."""
        return self._config.bound_schedule(step.num_steps, step.sigmas)

    def of(self, step: Step, rows: int, *, at_risk: bool = False) -> StepTable | str:
        """The table of the steps from `step` on, as a run of their own, or why there is none.

        `rows` of the batch tell whether it really holds the guidance parts of the pipeline. The
        rest of a run `at_risk` has the full steps that its guard has chosen.
        """
        parts = _parts(step, rows)
        run = step.generation
        levels, sampler = step.sigmas or run.levels_problem, (run.noise, run.multistep)
        over = self._excess(run)
        ratio = over.ratio if over else 1.0
        key = (step.num_steps, levels, step.branch, step.index, parts, sampler, ratio, at_risk)
        found = self._tables.get(key)
        if found is None:
            if len(self._tables) >= _MAX_TABLES:
                self._tables.clear()
            found = self._tables[key] = self._make(step, parts, over, at_risk)
        return found

    def _excess(self, run: Generation) -> Excess | None:
        """How far a run's guidance is above that of the training, if it is."""
        forecaster = self._config.forecaster
        if not isinstance(forecaster, LesaForecaster):
            return None
        return forecaster.excess(run.guidance, run.embedded, run.guided)

    def _make(self, step: Step, parts: int, over: Excess | None, at_risk: bool) -> StepTable | str:
        start = step.index
        try:
            whole = schedule = self.schedule(step)
            guard = self._config.guard_of(whole, step.sigmas)
            if start:
                rest = guard.schedule if guard is not None and at_risk else whole
                later = [s - start for s in rest.full_steps if s > start]
                schedule = Schedule.explicit([0, *later], step.num_steps - start)
        except LesaError as error:
            self._warn_of_count(str(error))
            return f"no table: {error}"
        try:
            options = self._away(step, schedule, over)
            forecaster = self._config.forecaster
            table = forecaster.table(schedule, step.sigmas[start:], step.branch, **options)
        except Exception as error:
            if not step.sigmas:
                return _without_levels(self._config.forecaster, step)
            if isinstance(error, LesaError):
                return f"no table: {error}"
            raise
        self._warn_of_large(table)
        if guard is None or start:
            return StepTable(table, parts)
        if guard.kind == "spend":
            return StepTable(table, parts, Guarded(guard, extra=guard.extra_steps(whole)))
        other = forecaster.table(guard.schedule, step.sigmas, step.branch, **options)
        return StepTable(table, parts, Guarded(guard, other=StepTable(other, parts)))

    def _warn_of_count(self, told: str) -> None:
        """Tell, once, of a run that is shorter than the full steps that were asked for."""
        if "count" not in self._told:
            self._told.add("count")
            warn(f"{told}, else every step is computed in full")

    def _warn_of_large(self, table: Table) -> None:
        """Tell, once, of coefficients that make noise of small errors of the features: Taylor 3 on
        a list whose full steps are all at the beginning has 1.2e6."""
        largest = largest_sum(table)
        if largest > LARGEST_SUM and "large" not in self._told:
            self._told.add("large")
            warn(
                f"{self._config.forecaster.name}: coefficients of one step add up to {largest:.3g} "
                f"in magnitude, above {LARGEST_SUM:.0f}, and magnify errors of the cached features "
                "by that; spread the full steps over the run, or use a lower order"
            )

    def _away(self, step: Step, schedule: Schedule, over: Excess | None) -> dict[str, Any]:
        """What a trained forecaster is told of a run that it was not trained for; the user is
        warned once of each kind, but not of a list that a count made: `enable` has told of it. The
        prior, which was trained for none, is told of the sampler."""
        forecaster, run = self._config.forecaster, step.generation
        if isinstance(forecaster, Prior):
            return {"multistep": run.multistep, "noise": run.noise}
        if not isinstance(forecaster, LesaForecaster) or not step.sigmas:
            return {}
        levels = step.sigmas[step.index :]
        found = forecaster.mismatch(schedule, levels, run.sampler, run.noise)
        over = over if schedule.skipped_steps else None
        for each in (found, over and over.mismatch()):
            counted = each and each.kind == "list" and self._config.schedule is None
            if each and not (counted or step.index or each.kind in self._told):
                self._told.add(each.kind)
                warn(each.told)
        away = {"noise": found.kind == "noise", "multistep": run.multistep} if found else {}
        return away | ({"guidance": over.ratio} if over else {})


def _parts(step: Step, rows: int) -> int:
    """The guidance parts of a batch of this many rows: 1 where it does not hold as many pictures of
    each as the pipeline makes."""
    pictures = step.generation.pictures
    if step.parts > 1 and pictures:
        return step.parts if rows == step.parts * pictures else 1
    return step.parts if rows % step.parts == 0 else 1


def _without_levels(forecaster: Forecaster, step: Step) -> str:
    """Why a forecaster has no table where there are no noise levels, and the remedy that fits."""
    pipe = None if step.generation.pipe is None else step.generation.pipe()
    return (
        f"no table: {forecaster.name} goes by noise levels, and {step.generation.levels_problem}; "
    ) + (
        other_size(pipe)
        or "use another scheduler, or a forecaster that goes by steps, as lesa.Taylor()"
    )
