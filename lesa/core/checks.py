"""What a user passed as a number, checked; and how a wrong value is shown in one sentence."""

from __future__ import annotations

import operator
import reprlib
from typing import Any

from lesa.errors import LesaError

MOST_STEPS = 100_000  # no sampler takes as many; a larger number is a slip, and would fill memory
MOST_SEED = 2**63 - 1  # that torch's noise sources take


def shown(value: Any) -> str:
    """A short text of any value, for a message."""
    shape = getattr(value, "shape", None)  # of a tensor or an array, which core need not import
    if isinstance(shape, tuple) and shape:
        return f"a {type(value).__name__.lower()} {list(shape)}"
    try:
        return reprlib.repr(value)
    except Exception:  # more digits than Python writes, an object that cannot show itself
        return f"a {type(value).__name__}"


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int: Python's, NumPy's, or a tensor's that holds one.

    Raises LesaError for anything else, a truth value included, and outside of `least` to `most`.
    """
    found = None
    if not isinstance(value, bool) and "bool" not in str(getattr(value, "dtype", "")):
        try:
            found = operator.index(value)
        except (TypeError, ValueError, RuntimeError):  # tensors of several elements raise these
            found = None
    if found is None or found < least:
        raise LesaError(
            f"{name}={shown(value)}: not a whole number >= {least}; use {least} or more"
        )
    if most is not None and found > most:
        raise LesaError(f"{name}={shown(value)}: above {most}; use {most} or less")
    return found


def real(name: str, value: Any, remedy: str) -> float:
    """`value` as a finite float; LesaError for anything else, a truth value included."""
    try:
        found = None if isinstance(value, (bool, str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = None
    if found is None or not abs(found) < float("inf"):
        raise LesaError(f"{name}={shown(value)}: not a finite number; {remedy}")
    return found


def reals(name: str, values: Any, remedy: str) -> tuple[float, ...]:
    """A sequence of finite numbers as floats; LesaError for anything else."""
    try:
        listed = None if isinstance(values, (str, bytes, dict, set)) else list(values)
    except (TypeError, RuntimeError):
        listed = None
    if listed is None:
        raise LesaError(f"{name}={shown(values)}: not a list of numbers; {remedy}")
    return tuple(real(f"{name}[{i}]", value, remedy) for i, value in enumerate(listed))
