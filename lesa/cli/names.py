"""Names that users choose from: near ones for a slip of the keyboard, and all of them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from lesa.errors import LesaError


def choose(name: str, known: Iterable[str], field: str, *, what: str = "unknown") -> str:
    """`name` if it is among the known ones.

    what: what is wrong with another name, for the error.

    Raises: LesaError with the names that are most like it, and all of them.
    """
    names = list(known)
    if name in names:
        return name
    near = did_you_mean(name, names)
    raise LesaError(f"{field}={name!r}: {what}{near}; choose from {', '.join(names)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ ", did you mean a or b?" for a slip of the keyboard, else nothing."""
    names = list(known)
    same = [other for other in names if other.lower() == name.lower()]
    near = same or get_close_matches(name.lower(), names, 2, 0.6)
    return f", did you mean {' or '.join(near)}" if near else ""
