"""What is kept of a request between its calls, and what becomes of one call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from lesa.engine.plans import Plan
from lesa.engine.trajectory import Trajectory

__all__ = ["Decision", "Kept"]


class Decision(NamedTuple):
    """What becomes of a call: a forecast of `trajectory` if `skip`, else the whole model runs.

    `trajectory` is the one that keeps the feature then, if any, and `reason` says why the call is
    full though no schedule asked for it.
    """

    trajectory: Trajectory | None
    skip: bool = False
    reason: str | None = None


@dataclass(slots=True)
class Kept:
    """What the engine keeps of a request: its trajectories by guidance branch, and its budget;
    where the model cannot be run with that, `problem` says why. `at_risk` tells whether a guard has
    something to do, once it has looked; `generation` is the number of this one."""

    plan: Plan
    generation: int = 0
    problem: str | None = None
    at_risk: bool | None = None
    trajectories: dict[str, Trajectory] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of its features."""
        rings = [trajectory.ring for trajectory in self.trajectories.values()]
        return sum(ring.nbytes for ring in rings if ring)
