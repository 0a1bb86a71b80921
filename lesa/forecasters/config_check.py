"""What the files of a forecaster must hold: checked before and after it is built of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lesa.core import schema
from lesa.core.checks import MOST_STEPS
from lesa.core.schedule import Schedule
from lesa.core.table import Table
from lesa.errors import LesaError
from lesa.forecasters import guard
from lesa.forecasters.calibration import Calibration
from lesa.forecasters.moments import Moments
from lesa.forecasters.settings import FIELDS, Settings
from lesa.forecasters.worth import STORED

__all__ = [
    "LARGEST_SUM",
    "Tabled",
    "check_config",
    "check_moments",
    "check_tables",
    "check_tensors",
    "largest_sum",
]

# Of the magnitudes of a row's coefficients. Trained rows stay below 12 on every embedded pipeline,
# and below 240 on tiny ones of random weights with two or three full steps.
LARGEST_SUM = 1000.0
DTYPES = {"float32": torch.float32, "float64": torch.float64}
REMEDY = "copy the folder again, or train anew"

_NAME, _LIST = schema.text(200), schema.items(schema.text(200), 0, 64)
_METADATA: dict[str, schema.Description] = {
    "model_class": schema.text(),
    "model_id": schema.text(10_000),
    "model_hash": schema.text(),
    "scheduler": schema.text(),
    "noise": schema.truth,
    "prompts": schema.whole_number(0, 10**9),
    "prompts_sha256": schema.text(),
    "seed": schema.whole_number(-(2**63), 2**64 - 1),
    "call": schema.table_of(schema.anything, 1000),
    "guidance": schema.table_of(schema.number(), 100),
    "guided": schema.truth,
    "interrupted": schema.truth,
}
_ENTRY = {
    "schedule": schema.table_of(schema.anything, 16),  # Schedule checks its own fields
    "sigmas": schema.items(schema.number(), 2, MOST_STEPS + 1),
    "branches": _LIST,
}
_CONFIG = schema.fields(
    {
        "settings": schema.fields({}, FIELDS),
        "dtype": schema.choice(*DTYPES),
        "calibrated": schema.items(
            schema.fields(
                _ENTRY,
                {
                    "split": _LIST,
                    "full_steps": schema.anything,
                    "worth": schema.maybe(STORED),
                    "guard": schema.maybe(guard.STORED),
                },
            ),
            0,
            1000,
        ),
        "metadata": schema.fields(
            {}, {name: schema.maybe(of) for name, of in _METADATA.items()}, others=True
        ),
    },
    others=True,
)


class Tabled(Protocol):
    """What is asked of a forecaster before it is believed."""

    settings: Settings
    calibrations: list[Calibration]
    moments: Moments

    def history(self, schedule: Schedule) -> int: ...

    def table(self, schedule: Schedule, sigmas: Sequence[float], branch: str = ...) -> Table: ...


def check_config(config: Any) -> None:
    """LesaError for a field that is missing, of another type or beyond any size in use."""
    schema.checked(config, _CONFIG, "config", REMEDY)


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """LesaError for a tensor of another dtype than a forecaster has, or one that is not finite."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise LesaError(f"tensor {name[:100]!r} is {tensor.dtype}, not float32; {REMEDY}")
        if not bool(tensor.isfinite().all()):
            raise LesaError(f"tensor {name[:100]!r} holds values that are not finite; {REMEDY}")


def check_tables(forecaster: Tabled) -> None:
    """LesaError unless each calibrated list makes a table for each branch, of finite coefficients
    with a sum of magnitudes up to `LARGEST_SUM`; without a calibration, every fifth step does."""
    known = [(entry.schedule, entry.sigmas) for entry in forecaster.calibrations]
    guards = [(entry.sigmas, entry.guard) for entry in forecaster.calibrations]
    known += [(g.schedule, sigmas) for sigmas, g in guards if g and g.kind == "route"]
    for schedule, sigmas in known or [_even(forecaster.settings)]:
        for branch in forecaster.settings.branches:
            table = forecaster.table(schedule, sigmas, branch)
            history = forecaster.history(schedule)
            if table.history != history:
                raise LesaError(
                    f"rows of {branch!r} weigh {table.history} features, settings have "
                    f"history={history}; {REMEDY}"
                )
            largest = largest_sum(table)
            if largest > LARGEST_SUM:
                raise LesaError(
                    f"rows of {branch!r}: coefficients of magnitude {largest:.3g} in one row, where"
                    f" trained ones stay below {LARGEST_SUM:.0f}; {REMEDY}"
                )


def check_moments(moments: Moments) -> None:
    """LesaError unless the stored matrices are inner products of something, up to rounding: rows of
    other ones have no bound."""
    for branch, gram in moments.grams.items():
        lengths = gram.double().diagonal().sqrt()
        alike = gram.double() / (lengths[:, None] * lengths)
        even = bool((alike - alike.T).abs().max() < 1e-4)
        raised = alike + 1e-4 * torch.eye(len(alike), dtype=torch.float64, device="cpu")
        if not even or int(torch.linalg.cholesky_ex(raised).info):
            raise LesaError(f"moments of {branch!r} are no inner products; {REMEDY}")


def largest_sum(table: Table) -> float:
    """The largest sum of magnitudes of a step's coefficients: by how much it can magnify an error
    of its features."""
    parts = [table.part(part).coefficients for part in range(table.parts)]
    return max(float(part.abs().sum(1).max()) for part in [table.coefficients, *parts])


def _even(settings: Settings) -> tuple[Schedule, tuple[float, ...]]:
    """Every fifth step in full, at noise levels that fall evenly."""
    steps = settings.num_steps if settings.form == "paper" else 50
    return Schedule.every(5, steps), tuple(1 - s / steps for s in range(steps + 1))
