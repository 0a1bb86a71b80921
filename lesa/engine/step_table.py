"""A table unpacked for the step path."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lesa.core.table import GatedRows, Table
from lesa.forecasters.guard import Guard

__all__ = ["DeviceTable", "Guarded", "Row", "StepTable", "gates_by_step"]


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


class Guarded(NamedTuple):
    """What becomes of the rest of a run if a picture of it is at risk: another table, or steps of
    this one that are computed in full all the same."""

    guard: Guard
    other: StepTable | None = None
    extra: tuple[int, ...] = ()


class StepTable:
    """A table, unpacked for the step path.

    `rows[s]` is None at a full step, else one row for each of the `parts` of a call: 1, or as
    many guidance parts as the table has separate coefficients for, where calls hold that many.
    `pushes[s]` says whether step s's feature enters the ring and `expected[s]` how many have
    entered before it. Features that no later step needs do not enter, and `history` is no more
    than any row reaches back, also of the table that a guard changes to. `last` is the last
    skipped step (0 where there is none), after which no ring is needed. `guarded` says what a
    picture at risk gets, if anything.
    """

    def __init__(self, table: Table, parts: int = 1, guarded: Guarded | None = None) -> None:
        self.guarded = guarded
        self.parts = parts if parts == table.parts else 1
        least = guarded.other.history if guarded is not None and guarded.other is not None else 1
        table = (table if self.parts > 1 else replace(table, split=None)).trimmed(least)
        schedule, width = table.schedule, table.history
        self.history: int = width
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
