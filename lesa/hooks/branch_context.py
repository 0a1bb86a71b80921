"""The guidance branch that a pipeline says its calls belong to, as it does with `cache_context`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

__all__ = ["Branch", "BranchContext", "branch_of"]


# Whom it was told (a clock), its name, what else was given with it, and the branch around it. A
# plain tuple, since one is made at every step.
Branch = tuple[object, str, Mapping[str, Any], Any]

_NONE: Branch = (None, "", {}, None)
# Every thread and every asyncio task has its own.
_now: ContextVar[Branch | None] = ContextVar("lesa_branch", default=None)


def branch_of(owner: object) -> Branch:
    """The branch of the calls that are made now, by what `owner` was told."""
    branch = _now.get()
    while branch is not None and branch[0] is not owner:
        branch = branch[3]
    return branch or _NONE


class BranchContext:
    """Gives the calls inside a name and fields; `inner` is entered and left along with it.

    A class, since a generator costs twice the time and every step enters one.
    """

    __slots__ = ("_before", "_fields", "_inner", "_name", "_owner")

    def __init__(
        self,
        owner: object,
        name: str,
        fields: Mapping[str, Any],
        inner: AbstractContextManager[Any] | None,
    ) -> None:
        self._owner, self._name, self._fields, self._inner = owner, name, fields, inner

    def __enter__(self) -> None:
        if self._inner is not None:
            self._inner.__enter__()
        self._before = before = _now.get()
        _now.set((self._owner, self._name, self._fields, before))

    def __exit__(self, *error: Any) -> None:
        _now.set(self._before)  # a generator may leave it in another task than it entered
        if self._inner is not None:
            self._inner.__exit__(*error)
