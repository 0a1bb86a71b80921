"""Locks in a process that forks: a child must not wait for a thread that only its parent has."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet

__all__ = ["Forkable", "renew_in_children"]


class Forkable(Protocol):
    """What holds locks or marks of a call that is going on."""

    def renew(self) -> None:
        """In a child process: new locks, and nothing of what other threads were at."""


_known: WeakSet[Forkable] = WeakSet()


def renew_in_children(owner: Forkable) -> None:
    """Call `owner.renew()` in every process that is forked from this one; held weakly."""
    _known.add(owner)


def _renew_all() -> None:
    for owner in list(_known):
        owner.renew()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_renew_all)
