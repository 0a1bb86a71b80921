"""A guard: what a picture at risk runs instead of the rest of a step list."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lesa.core import schema
from lesa.core.checks import MOST_STEPS, shown
from lesa.core.schedule import Schedule
from lesa.errors import LesaError

__all__ = ["MODES", "STORED", "Guard", "Mode", "check_mode", "relative_change"]

Kind = Literal["route", "spend"]
Mode = Literal["off", "route", "spend"]
MODES = get_args(Mode)
STORED = schema.fields(
    {
        "step": schema.whole_number(1, MOST_STEPS),
        "limit": schema.number(0.0, 1e9),
        "share": schema.number(0.0, 1.0),
        "schedule": schema.table_of(schema.anything, 16),  # Schedule checks its own fields
    },
    {
        "branches": schema.items(schema.text(200), 0, 64),
        "split": schema.items(schema.text(200), 0, 64),
    },
)


@dataclass(frozen=True, eq=False)
class Guard:
    """What a run follows from one of its first full steps on, if a picture of it is at risk.

    At full step `step` the largest relative change of a picture's feature since the full step
    before is read, once (see `relative_change`). Above `limit` the run goes on with `schedule`,
    which is like the guarded list up to there, and then

    - "route": has as many full steps, at other places, with `rows` of its own;
    - "spend": has further full steps. What they compute does not enter the ring, so that all other
      steps are forecast as they were fitted.

    A batch is one run, so one picture at risk decides for all of it. Several guidance branches
    follow the first one that is called.

    Args:
        step: a full step after the first.
        limit: the change above which it acts.
        schedule: bound to as many steps as the guarded list.
        rows: of "route", per guidance branch, as in `Calibration`.
        split: the same for batched guidance parts.
        share: of the pictures that training looked at, those above the limit.
    """

    step: int
    limit: float
    schedule: Schedule
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    split: Mapping[str, Tensor] = field(default_factory=dict)
    share: float = 0.0

    @property
    def kind(self) -> Kind:
        """What it does."""
        return "route" if self.rows else "spend"

    def extra_steps(self, guarded: Schedule) -> tuple[int, ...]:
        """The full steps that "spend" adds; none of "route"."""
        known = set(guarded.full_steps)
        added = (step for step in self.schedule.full_steps if step not in known)
        return tuple(added) if self.kind == "spend" else ()

    def mean_full_steps(self, guarded: Schedule) -> float:
        """How many full steps a picture takes, where `share` of them are at risk."""
        return len(guarded.full_steps) + self.share * len(self.extra_steps(guarded))

    def described(self, guarded: Schedule) -> dict[str, Any]:
        """What it does with this list, as plain values."""
        return {
            "kind": self.kind,
            "step": self.step,
            "limit": self.limit,
            "share": self.share,
            "full_steps": list(self.schedule.full_steps),
            "extra_steps": list(self.extra_steps(guarded)),
        }

    def to_dict(self) -> dict[str, Any]:
        """Its fields, ready for JSON, but for the coefficients."""
        return {
            "step": self.step,
            "limit": self.limit,
            "share": self.share,
            "schedule": self.schedule.to_dict(),
            "branches": list(self.rows),
            "split": list(self.split),
        }

    @classmethod
    def from_dict(
        cls, stored: Mapping[str, Any], rows: Mapping[str, Tensor], split: Mapping[str, Tensor]
    ) -> Guard:
        """What `to_dict` gave, with the coefficients; LesaError for a wrong step list."""
        schedule = Schedule.from_dict(stored["schedule"])
        return cls(stored["step"], stored["limit"], schedule, rows, split, stored["share"])

    def check(self, guarded: Schedule, branches: Collection[str]) -> None:
        """LesaError unless it can guard this list, with rows for these branches."""
        own, other = guarded.full_steps, self.schedule.full_steps
        early = [[step for step in steps if step <= self.step] for steps in (own, other)]
        if self.schedule.num_steps != guarded.num_steps:
            wrong = f"it is of {self.schedule.num_steps} steps, and guards {guarded.num_steps}"
        elif self.step not in own[1:]:
            wrong = f"step {self.step} is no later full step of {own}"
        elif early[0] != early[1]:
            wrong = f"up to step {self.step} it differs from {own}"
        elif self.rows and self.rows.keys() != {*branches}:
            wrong = f"it has rows for {sorted(self.rows)}, not for {sorted(branches)}"
        elif self.kind == "route" and len(own) != len(other):
            wrong = f"it has {len(other)} full steps, and guards {len(own)}"
        elif self.kind == "spend" and not set(own) < set(other):
            wrong = f"it adds no full steps to {own}"
        else:
            return
        raise LesaError(f"guard={list(other)}: {wrong}; train it anew")


def check_mode(mode: Any) -> None:
    """LesaError for what is no way to guard a run."""
    if mode is not None and not (isinstance(mode, str) and mode in MODES):
        known = ", ".join(map(repr, MODES))
        raise LesaError(f"guard={shown(mode)}: unknown; give one of {known}, or leave it out")


def relative_change(now: Tensor, before: Tensor) -> Tensor:
    """|v_s - v_p| / |v_s| of every row of two features ``[rows, ...]``, in float32 ``[rows]``.

    Nothing waits for a device.
    """

    def norm(rows: Tensor) -> Tensor:
        return torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=torch.float32)

    return norm(now - before) / norm(now)
