"""What several peers need of one bench is made once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import wraps
from typing import TypeVar

from lesa.evaluation.method import Bench

T = TypeVar("T")


def once_per_bench(make: Callable[[Bench], T]) -> Callable[[Bench], T]:
    """`make`, called once for each bench object; its value lives as long as the bench.

    The value must not refer to the bench.
    """
    found: dict[int, T] = {}

    @wraps(make)
    def remembered(bench: Bench) -> T:
        key = id(bench)
        if key not in found:
            found[key] = make(bench)
            weakref.finalize(bench, found.pop, key, None)
        return found[key]

    return remembered
