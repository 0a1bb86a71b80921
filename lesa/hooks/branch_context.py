"""The guidance branch that a pipeline says its calls belong to, as it does with `cache_context`."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

__all__ = ["Branch", "BranchContext"]


class Branch(threading.local):
    """A thread's branch: its name and what else was given with it."""

    name: str = ""
    fields: Mapping[str, Any] = {}


class BranchContext:
    """Gives the calls inside a name and fields; `inner` is entered and left along with it.

    A class, since a generator costs twice the time and every step enters one.
    """

    __slots__ = ("_before", "_branch", "_inner", "_now")

    def __init__(
        self,
        branch: Branch,
        name: str,
        fields: Mapping[str, Any],
        inner: AbstractContextManager[Any] | None,
    ) -> None:
        self._branch, self._now, self._inner = branch, (name, fields), inner

    def __enter__(self) -> None:
        branch = self._branch
        if self._inner is not None:
            self._inner.__enter__()
        self._before = branch.name, branch.fields
        branch.name, branch.fields = self._now

    def __exit__(self, *error: Any) -> None:
        self._branch.name, self._branch.fields = self._before
        if self._inner is not None:
            self._inner.__exit__(*error)
