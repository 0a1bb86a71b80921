"""A table unpacked for the step path, and where to get it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lesa.core.forecaster import Forecaster
from lesa.core.schedule import Schedule
from lesa.core.table import GatedRows, Table
from lesa.engine.config import LesaConfig
from lesa.errors import LesaError
from lesa.forecasters.config_check import LARGEST_SUM, largest_sum
from lesa.forecasters.lesa import LesaForecaster
from lesa.forecasters.prior import Prior
from lesa.hooks.scheduler_advice import other_size
from lesa.hooks.step_clock import Step

__all__ = ["DeviceTable", "Row", "StepTable", "StepTables", "gates_by_step", "needs_levels"]

_MAX_TABLES = 64


class Row(NamedTuple):
    """One skipped step's coefficients as plain floats: nothing is converted on the step path."""

    coefficients: tuple[float, ...]
    latent: float
    bias: float


class DeviceTable(NamedTuple):
    """The coefficients on a device, for kernels: fp32 [S, K (+ 1)] and [S] or None, with a last
    dimension more for several parts; S step numbers.

    A row of a full step is zero. `gated` is the paper's form of the rows, fp32 and int32, if any.
    """

    coefficients: Tensor
    bias: Tensor | None
    steps: tuple[Tensor, ...]
    gated: GatedRows | None = None


class StepTable:
    """A table, unpacked for the step path.

    `rows[s]` is None at a full step, else one row for each of the `parts` of a call: 1, or as
    many guidance parts as the table has separate coefficients for, where calls hold that many.
    `pushes[s]` says whether step s's feature enters the ring and `expected[s]` how many have
    entered before it. Features that no later step needs do not enter, and `history` is no more
    than any row reaches back. `last` is the last skipped step (0 where there is none), after
    which no ring is needed.
    """

    def __init__(self, table: Table, parts: int = 1) -> None:
        self.parts = parts if parts == table.parts else 1
        table = (table if self.parts > 1 else replace(table, split=None)).trimmed()
        schedule, width = table.schedule, table.history
        self.history = width
        self.uses_latent = table.uses_latent
        self.autoregressive = table.autoregressive
        self.rows: list[tuple[Row, ...] | None] = [None] * schedule.steps
        tables = [table.part(p).coefficients.tolist() for p in range(self.parts)]
        biases = [0.0] * schedule.steps if table.bias is None else table.bias.tolist()
        for s in schedule.skipped_steps:
            self.rows[s] = tuple(
                Row(tuple(rows[s][:width]), rows[s][-1] if table.uses_latent else 0.0, biases[s])
                for rows in tables
            )
        self.last = last = max(schedule.skipped_steps, default=0)
        enters = [table.autoregressive or row is None for row in self.rows]
        self.pushes = [enter and s < last for s, enter in enumerate(enters)]
        self.expected = list(accumulate(self.pushes, initial=0))
        self._table = table
        self._devices: dict[torch.device, DeviceTable] = {}

    def on(self, device: torch.device) -> DeviceTable:
        """The rows on a device; copied there once."""
        found = self._devices.get(device)
        if found is None:
            table = self._table
            with torch.inference_mode(False):  # it outlives the generation that asked first
                bias = None if table.bias is None else table.bias.float().to(device)
                if bias is not None and self.parts > 1:
                    bias = bias[:, None].repeat(1, self.parts)
                steps = torch.arange(len(self.rows), dtype=torch.int32, device=device)
                rows = table.coefficients if table.split is None else table.split
                coefficients = rows.float().contiguous().to(device)
                gated = table.gated and _moved(table.gated, device)
            found = DeviceTable(coefficients, bias, steps.unbind(0), gated)
            self._devices[device] = found
        return found


def _moved(gated: GatedRows, device: torch.device) -> GatedRows:
    def number(values: Tensor) -> Tensor:
        return values.float().contiguous().to(device)

    gate = gated.gate
    moved = gate._replace(
        projection=number(gate.projection),
        shift=number(gate.shift),
        base=number(gate.base),
        spline=number(gate.spline),
    )
    return GatedRows(
        number(gated.weights),
        number(gated.bias),
        number(gated.tau),
        gated.experts.to(device),
        moved,
    )


def gates_by_step(gated: GatedRows) -> list[tuple[Any, ...]]:
    """Of each step weights, tau, its expert's gate and the bias, for the compiled kernel."""
    *parts, low, high = gated.gate
    experts = gated.experts.tolist()
    rows = zip(gated.weights.unbind(0), gated.tau.unbind(0), gated.bias.tolist(), strict=True)
    return [
        (weights, tau, *(part[expert] for part in parts), low, high, bias)
        for expert, (weights, tau, bias) in zip(experts, rows, strict=True)
    ]


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

    def of(self, step: Step, rows: int) -> StepTable | str:
        """The table of the steps from `step` on, as a run of their own, or why there is none.

        `rows` of the batch tell whether it really holds the guidance parts of the pipeline.
        """
        parts = _parts(step, rows)
        run = step.generation
        levels, sampler = step.sigmas or run.levels_problem, (run.noise, run.multistep)
        guidance = (run.embedded, *run.guidance.items())
        key = (step.num_steps, levels, step.branch, step.index, parts, sampler, guidance)
        found = self._tables.get(key)
        if found is None:
            if len(self._tables) >= _MAX_TABLES:
                self._tables.clear()
            found = self._tables[key] = self._make(step, parts)
        return found

    def _make(self, step: Step, parts: int) -> StepTable | str:
        start = step.index
        try:
            schedule = self.schedule(step)
            if start:
                later = [s - start for s in schedule.full_steps if s > start]
                schedule = Schedule.explicit([0, *later], step.num_steps - start)
        except LesaError as error:
            self._warn_of_count(str(error))
            return f"no table: {error}"
        try:
            options = self._away(step, schedule)
            forecaster = self._config.forecaster
            table = forecaster.table(schedule, step.sigmas[start:], step.branch, **options)
        except Exception as error:
            if not step.sigmas:
                return _without_levels(self._config.forecaster, step)
            if isinstance(error, LesaError):
                return f"no table: {error}"
            raise
        self._warn_of_large(table)
        return StepTable(table, parts)

    def _warn_of_count(self, told: str) -> None:
        """Tell, once, of a run that is shorter than the full steps that were asked for."""
        if "count" not in self._told:
            self._told.add("count")
            warnings.warn(f"{told}, else every step is computed in full", stacklevel=2)

    def _warn_of_large(self, table: Table) -> None:
        """Tell, once, of coefficients that make noise of small errors of the features: Taylor 3 on
        a list whose full steps are all at the beginning has 1.2e6."""
        largest = largest_sum(table)
        if largest > LARGEST_SUM and "large" not in self._told:
            self._told.add("large")
            warnings.warn(
                f"{self._config.forecaster.name}: coefficients of one step add up to {largest:.3g} "
                f"in magnitude, above {LARGEST_SUM:.0f}, and magnify errors of the cached features "
                "by that; spread the full steps over the run, or use a lower order",
                stacklevel=2,
            )

    def _away(self, step: Step, schedule: Schedule) -> dict[str, Any]:
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
        over = forecaster.excess(run.guidance, run.embedded) if schedule.skipped_steps else None
        for each in (found, over and over.mismatch()):
            counted = each and each.kind == "list" and self._config.schedule is None
            if each and not (counted or step.index or each.kind in self._told):
                self._told.add(each.kind)
                warnings.warn(each.told, stacklevel=2)
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
