"""What a file may hold: plain values against a description of them, a wrong one told by its place.

A description is made of the functions here: `fields({"seed": whole_number(0, 9)})` is an object
that has a seed, and `checked(value, description, "config", remedy)` raises LesaError with the one
sentence "config.seed=-1: not a whole number of 0 to 9; remedy".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf, isfinite
from typing import Any

from lesa.core.checks import shown
from lesa.errors import LesaError

__all__ = [
    "Description",
    "anything",
    "checked",
    "choice",
    "fields",
    "items",
    "maybe",
    "number",
    "table_of",
    "text",
    "truth",
    "whole_number",
]

Description = Callable[[str, Any], None]  # of a value and its place; raises _Wrong


class _Wrong(Exception):
    pass


def checked(value: Any, description: Description, place: str, remedy: str) -> Any:
    """`value`; LesaError, ending with the remedy, where it is not what the description says."""
    try:
        description(place, value)
    except _Wrong as wrong:
        raise LesaError(f"{wrong}; {remedy}") from None
    return value


def anything(place: str, value: Any) -> None:
    """Any value."""


def text(longest: int = 1000) -> Description:
    """A text."""

    def check(place: str, value: Any) -> None:
        _require(isinstance(value, str), place, value, "not a text")
        _require(len(value) <= longest, place, value, f"longer than {longest} characters")

    return check


def whole_number(least: int, most: int) -> Description:
    """An int within bounds."""

    def check(place: str, value: Any) -> None:
        whole = isinstance(value, int) and not isinstance(value, bool)
        _require(whole, place, value, f"not a whole number of {least} to {most}")
        _require(least <= value <= most, place, value, f"not a whole number of {least} to {most}")

    return check


def number(least: float = -inf, most: float = inf) -> Description:
    """A finite int or float within bounds."""
    bounds = "" if (least, most) == (-inf, inf) else f" of {least} to {most}"

    def check(place: str, value: Any) -> None:
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = numeric and least <= value <= most and abs(value) < 1e300 and isfinite(value)
        _require(fits, place, value, f"not a finite number{bounds}")

    return check


def truth(place: str, value: Any) -> None:
    """True or False."""
    _require(isinstance(value, bool), place, value, "neither true nor false")


def choice(*known: str) -> Description:
    """One of these texts."""

    def check(place: str, value: Any) -> None:
        listed = ", ".join(map(repr, known))
        _require(isinstance(value, str) and value in known, place, value, f"not one of {listed}")

    return check


def maybe(description: Description) -> Description:
    """None, or what the description says."""

    def check(place: str, value: Any) -> None:
        if value is not None:
            description(place, value)

    return check


def items(each: Description, least: int, most: int) -> Description:
    """A list or tuple of `least` to `most` such values."""

    def check(place: str, value: Any) -> None:
        _require(isinstance(value, (list, tuple)), place, value, "not a list")
        fits = least <= len(value) <= most
        _require(fits, place, value, f"{len(value)} items, not {least} to {most}")
        for index, item in enumerate(value):
            each(f"{place}[{index}]", item)

    return check


def table_of(each: Description, most: int) -> Description:
    """An object with up to `most` names of its own choice, all with such values."""

    def check(place: str, value: Any) -> None:
        _require(isinstance(value, Mapping), place, value, "not an object")
        _require(len(value) <= most, place, value, f"{len(value)} names, not up to {most}")
        for name, item in value.items():
            text()(f"a name of {place}", name)
            each(_below(place, name), item)

    return check


def fields(
    required: Mapping[str, Description],
    optional: Mapping[str, Description] | None = None,
    others: bool = False,
) -> Description:
    """An object with these fields; one that is in neither list only with `others`."""
    known = {**required, **(optional or {})}

    def check(place: str, value: Any) -> None:
        _require(isinstance(value, Mapping), place, value, "not an object")
        for name in required:
            if name not in value:
                raise _Wrong(f"{place} has no {name}")
        for name, item in value.items():
            if name in known:
                known[name](_below(place, name), item)
            elif not others:
                raise _Wrong(f"{place} has an unknown field {shown(name)}")

    return check


def _below(place: str, name: Any) -> str:
    """The place of a field; a name that is no word is shortened and quoted."""
    word = str(name) if isinstance(name, str) and name.isidentifier() else shown(name)
    return f"{place}.{word[:60]}" if place else word[:60]


def _require(condition: bool, place: str, value: Any, problem: str) -> None:
    if not condition:
        raise _Wrong(f"{place}={shown(value)}: {problem}")
