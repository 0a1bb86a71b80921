"""Rollouts that have had the same full steps and the same rows so far share what they compute."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from lesa.training.rollout import RolloutSpec

__all__ = ["Prefixes", "parting"]


class Prefixes:
    """Who computes which step, for rollouts of the same pictures."""

    def __init__(self, specs: Sequence[RolloutSpec]) -> None:
        self.specs = specs
        self.dropped: set[int] = set()
        self._partings = [
            [parting(specs[earlier], spec) for earlier in range(copy)]
            for copy, spec in enumerate(specs)
        ]

    def drop(self, copies: Iterable[int]) -> None:
        """These compute nothing more."""
        self.dropped.update(copies)

    def source(self, copy: int, step: int) -> int | None:
        """The first rollout with the same states and the same output as this one at a step, which
        may be itself; None where it has been dropped."""
        if copy in self.dropped:
            return None
        earlier = enumerate(self._partings[copy])
        alike = (i for i, parts in earlier if parts > step and i not in self.dropped)
        return next(alike, copy)

    def computed(self, step: int) -> list[int]:
        """The rollouts whose full step is computed."""
        return [
            copy
            for copy, spec in enumerate(self.specs)
            if spec.schedule.is_full(step) and self.source(copy, step) == copy
        ]


def parting(one: RolloutSpec, other: RolloutSpec) -> int:
    """The first step whose output may differ between two rollouts of the same pictures."""
    differ = set(one.schedule.full_steps) ^ set(other.schedule.full_steps)
    found = min(differ, default=one.schedule.steps)
    skipped = [step for step in one.schedule.skipped_steps if step < found]
    alike = replace(one, schedule=other.schedule, rows=None, shared={}) == replace(
        other, rows=None, shared={}
    )
    if not alike or (one.rows is None) != (other.rows is None):
        return min(skipped, default=found)
    if one.rows is None or other.rows is None or one.rows is other.rows:
        return found
    pairs = [(rows, other.rows[branch]) for branch, rows in one.rows.items()]
    apart = (s for s in skipped if not all(torch.equal(a[s], b[s]) for a, b in pairs))
    return min(apart, default=found)
