"""Whose call is this? What is kept of one request between its calls of the denoiser."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from itertools import count
from typing import Any, NamedTuple

from lesa.core.checks import shown
from lesa.errors import LesaError
from lesa.hooks.noise_levels import own_noise_levels
from lesa.util.forks import renew_in_children

__all__ = ["Joint", "Request", "Requests", "Source", "install", "installed", "source_of"]

_numbers = count()


class Source(NamedTuple):
    """What tells the steps of a loop of one's own.

    Attributes:
        scheduler: its diffusers scheduler, or None.
        sigmas: its S + 1 noise levels in [0, 1], or none.
    """

    scheduler: Any = None
    sigmas: tuple[float, ...] = ()


class Request:
    """One request at one clock: its run, its budget, and what the controller keeps of it.

    A thread has one of its own. A `lesa.Slot` holds others, which no thread owns.

    Attributes:
        run: gives its run at the last call, None once that is over.
        own: its run in a loop of one's own.
        kept: the controller's; None before the first call and after `reset`.
        options: its budget, instead of the one that its calls are inside of.
        source: tells its steps; None leaves it to the clock.
        index: the step of its next call, where a server tells that.
        turn: held by the thread that makes a call in it; None where one thread owns it.
        name: under this name a pipeline's frame keeps the run.
        token: tells it from other requests without keeping it alive.
    """

    __slots__ = (
        "__weakref__",
        "index",
        "kept",
        "name",
        "options",
        "own",
        "run",
        "source",
        "token",
        "turn",
    )

    def __init__(
        self, options: Any = None, source: Source | None = None, *, shared: bool = False
    ) -> None:
        self.run: Callable[[], Any] = lambda: None
        self.own: Any = None
        self.kept: Any = None
        self.options, self.source = options, source
        self.index: int | None = None
        self.turn = threading.RLock() if shared else None
        self.name = f"__lesa_run_{next(_numbers)}__"
        self.token = object()
        if shared:
            renew_in_children(self)

    def renew(self) -> None:
        """In a forked process: no other thread is in it."""
        self.turn = threading.RLock()


class Joint(NamedTuple):
    """Several requests whose rows lie in one batch.

    Attributes:
        requests: one for each part of the batch.
        rows: the rows of each, in its own order.
    """

    requests: tuple[Request, ...]
    rows: tuple[Sequence[int], ...]


class _Thread(threading.local):
    """A thread's own request."""

    def __init__(self) -> None:
        self.request = Request()


class Requests:
    """The requests at one clock, and which of them a call belongs to."""

    def __init__(self) -> None:
        self._thread = _Thread()

    def now(self) -> Request | Joint:
        """The installed one, or those of a batch; else the thread's own."""
        everywhere = _installed.get()
        if everywhere is not None:
            found = everywhere.get(self)
            if found is not None:
                return found
        return self._thread.request


_Installed = Mapping[Requests, Request | Joint]
# Every thread and every asyncio task has its own.
_installed: ContextVar[_Installed | None] = ContextVar("lesa_requests", default=None)


def installed() -> _Installed:
    """What is installed in this thread or task, by clock."""
    return _installed.get() or {}


def install(requests: _Installed) -> None:
    """Let the calls of this thread or task belong to these requests."""
    _installed.set(requests or None)


def source_of(scheduler: Any, steps: int | None, sigmas: Sequence[float] | None) -> Source | None:
    """What was given of these, checked; None where nothing was.

    Raises: LesaError for what is no scheduler or no noise levels, or where both were given.
    """
    if scheduler is not None and not hasattr(scheduler, "timesteps"):
        raise LesaError(f"scheduler={shown(scheduler)}: not a diffusers scheduler; give one")
    if scheduler is not None and (steps is not None or sigmas is not None):
        given = "num_inference_steps" if sigmas is None else "sigmas"
        raise LesaError(
            f"{given}={shown(steps if sigmas is None else sigmas)}: the scheduler tells the steps "
            "already; give one of the two"
        )
    levels = own_noise_levels(steps, sigmas)
    return Source(scheduler, levels) if levels or scheduler is not None else None
