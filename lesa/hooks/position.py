"""Which index? Where in its generation a run is, by what its calls tell."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch

from lesa.hooks.generation import Generation

__all__ = ["Position"]


class Position:
    """The step that a run is at, and how many calls it has made there.

    Attributes:
        index: the step.
        standing: whether the scheduler has not moved since the run began: that is so at its first
            step, and where copies of the scheduler are stepped in its place.

    Args:
        kwargs: the arguments of its first call by name.
    """

    __slots__ = (
        "_calls",
        "_first_latent",
        "_first_time",
        "_last",
        "_last_time",
        "_mark",
        "index",
        "standing",
    )

    def __init__(self, kwargs: Mapping[str, Any] | None = None) -> None:
        self.index = 0
        self.standing = True
        self._calls: dict[str, int] = {}
        self._first_time = self._last_time = _time_of(kwargs)
        self._mark: Any = None
        self._last = _references(kwargs)
        latent = _latent_of(kwargs)
        self._first_latent: Any = (lambda: None) if latent is None else weakref.ref(latent)

    def find(
        self,
        generation: Generation,
        scheduler: Any,
        name: str,
        fields: Mapping[str, Any],
        kwargs: Mapping[str, Any] | None,
    ) -> int:
        """The index of a call in the branch `name`."""
        told = fields.get("step_index")
        if told is not None:
            return int(told)
        if generation.counting:  # a branch that comes round again is at the next step
            again = name in self._calls and not self._is_branch(kwargs)
            return self.index + 1 if again else self.index
        position = scheduler.step_index
        if position is not None:
            self.standing = False
            return int(position) - generation.first
        return self._by_time(generation, name, kwargs) if self.standing else 0

    def at_first(self, generation: Generation, scheduler: Any, name: str) -> bool:
        """Whether the first step goes on, for all that is known before a call."""
        if self.index or generation.counting:
            return not self.index and name not in self._calls
        position = scheduler.step_index
        return position is None or int(position) == generation.first

    def _by_time(self, generation: Generation, name: str, kwargs: Mapping[str, Any] | None) -> int:
        """The index by the time of the pipeline or of the call, which no device is read for: a
        branch that comes round again at another time is at the next step."""
        pipe = None if generation.pipe is None else generation.pipe()
        mark = getattr(pipe, "_current_timestep", None)
        if mark is None:
            mark = _time_of(kwargs)
        last, self._mark = self._mark, mark
        same = mark is last or (isinstance(mark, float) and mark == last)
        moved = not same and mark is not None and last is not None and bool(self._calls)
        return self.index + 1 if moved else self.index

    def is_over(
        self, scheduler: Any, generation: Generation, index: int, kwargs: Mapping[str, Any] | None
    ) -> bool:
        """Whether a loop whose steps are counted has begun anew: the time of its first step came
        again or, without a scheduler, the time turned or there were too many steps."""
        if scheduler is not None and not generation.counting:
            return index >= generation.num_steps
        time, last, times = _time_of(kwargs), self._last_time, generation.times
        self._last_time, self._last = time, _references(kwargs)
        again = time is not None and time == self._first_time and index > 0
        # Only the very same latent too is the next step of a loop in which nothing changes.
        known = scheduler is not None and index < len(times)
        if again and (times[index] != times[0] if known else not self._repeats(kwargs, last)):
            return True
        return scheduler is None and (self._turns(time, last) or index >= generation.num_steps)

    def _turns(self, time: float | None, last: float | None) -> bool:
        """Whether the time goes against the way that it took so far: down in most models, up in
        some."""
        first = self._first_time
        if time is None or last is None or first is None:
            return False
        return (time - last) * (last - first) < 0

    def _is_branch(self, kwargs: Mapping[str, Any] | None) -> bool:
        """Whether a call without a name is another guidance branch of the last one's step: the same
        time and latent, and another prompt."""
        time, now = _time_of(kwargs), _tensors(kwargs)
        if time is None or time != self._last_time or not now or len(now) != len(self._last):
            return False
        same = [value is known() for value, known in zip(now, self._last, strict=True)]
        return same[0] and not all(same)

    def _repeats(self, kwargs: Mapping[str, Any] | None, last: float | None) -> bool:
        """Whether the time has been the first call's at all calls, and the latent now is."""
        latent = self._first_latent()
        return last == self._first_time and latent is not None and latent is _latent_of(kwargs)

    def count(self, index: int, name: str) -> int:
        """Go to `index`; how many calls in the branch `name` there were at it before this one."""
        if index != self.index:
            self._calls.clear()
            self.index = index
        ordinal = self._calls.get(name, 0)
        self._calls[name] = ordinal + 1
        return ordinal


def _tensors(kwargs: Mapping[str, Any] | None) -> list[torch.Tensor]:
    """The tensors that a call is given besides its time; the latent, which denoisers name
    differently, is the first."""
    given = (value for name, value in (kwargs or {}).items() if name != "timestep")
    return [value for value in given if isinstance(value, torch.Tensor)]


def _latent_of(kwargs: Mapping[str, Any] | None) -> torch.Tensor | None:
    return next(iter(_tensors(kwargs)), None)


def _references(kwargs: Mapping[str, Any] | None) -> list[weakref.ref[torch.Tensor]]:
    return [weakref.ref(value) for value in _tensors(kwargs)]


def _time_of(kwargs: Mapping[str, Any] | None) -> float | None:
    """The time that a call is given, where it is a number on the host; the first row's."""
    time = (kwargs or {}).get("timestep")
    if isinstance(time, torch.Tensor):
        return float(time.flatten()[0]) if time.device.type == "cpu" and time.numel() else None
    return float(time) if isinstance(time, Real) else None
