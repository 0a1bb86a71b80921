"""NVTX ranges: what each part of a step is on a profiler's timeline, in the domain "lesa".

    with ranges.mix:
        ...

`full` is a full step, `push` a feature's copy into the ring, `mix` a forecast (`spline_mix` one of
the paper's form, whose kernel evaluates the gate), `tail` the modules behind it; `capture` and
`replay` are those of a CUDA graph, whose parts a replay does not show.

When this module is imported it asks nvtx whether a profiler listens. Where none does, where nvtx is
not installed, and with LESA_NVTX=0 in the environment, a range does nothing (0.1 us).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

__all__ = [
    "Range",
    "Ranges",
    "build",
    "capture",
    "full",
    "mix",
    "push",
    "replay",
    "spline_mix",
    "tail",
]

VARIABLE = "LESA_NVTX"
DOMAIN = "lesa"


F = TypeVar("F", bound=Callable[..., Any])


class Range:
    """A context manager that does nothing; without state, so nested blocks and threads share it."""

    __slots__ = ()

    def around(self, function: F) -> F:
        """`function` with this range around each call: the function itself if nobody listens."""
        return function

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


class _Marked(Range):
    """One that a profiler sees. NVTX keeps a stack per thread, so there is no state here either."""

    __slots__ = ("_event", "_pop", "_push")

    def __init__(self, domain: Any, event: Any) -> None:
        self._push, self._pop, self._event = domain.push_range, domain.pop_range, event

    def around(self, function: F) -> F:
        @wraps(function)
        def within(*args: Any) -> Any:
            with self:
                return function(*args)

        return within  # type: ignore[return-value]

    def __enter__(self) -> None:
        self._push(self._event)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pop()


class Ranges(NamedTuple):
    """All ranges of a step."""

    full: Range
    push: Range
    mix: Range
    spline_mix: Range
    tail: Range
    capture: Range
    replay: Range


_EVENTS = {  # message, category and colour, registered once
    "full": ("full step", "step", "blue"),
    "push": ("push", "step", "cyan"),
    "mix": ("mix", "step", "green"),
    "spline_mix": ("spline_mix", "step", "green"),
    "tail": ("tail", "step", "yellow"),
    "capture": ("capture", "graph", "red"),
    "replay": ("replay", "graph", "purple"),
}


def build() -> Ranges:
    """The ranges that this process needs, by its environment and by who listens."""
    domain = _domain()
    return Ranges(**{name: _range(domain, *event) for name, event in _EVENTS.items()})


def _domain() -> Any:
    if os.environ.get(VARIABLE) == "0":
        return None
    try:
        import nvtx
    except ImportError:
        return None
    return nvtx.get_domain(DOMAIN)


def _range(domain: Any, message: str, category: str, color: str) -> Range:
    if domain is None:
        return Range()
    event = domain.get_event_attributes(message=message, color=color, category=category)
    return Range() if event is None else _Marked(domain, event)  # None: nobody listens


full, push, mix, spline_mix, tail, capture, replay = build()
