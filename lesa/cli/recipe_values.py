"""Values of a recipe, each with the type that its key has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lesa.core.checks import shown
from lesa.errors import LesaError

__all__ = [
    "Kind",
    "as_flag",
    "as_name",
    "as_number",
    "as_pairs",
    "as_settings",
    "as_shape",
    "as_text",
    "as_whole",
    "checked",
    "counts",
    "known",
    "mapping",
]

Kind = Callable[[Any], Any]  # takes a value as YAML has it; ValueError says what it should be


def checked(told: str, key: str, value: Any, kind: Kind) -> Any:
    """The value as the command line would have it.

    told: how messages begin, with the recipe's name.

    Raises: LesaError for a value of another type.
    """
    try:
        return kind(value)
    except ValueError as error:
        name = key.replace("_", "-")
        raise LesaError(f"{told}: {name}={shown(value)} is not {error}") from None


def as_text(value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise ValueError('a text; put it in quotes, such as "bf16"')
    return value


def as_name(value: Any) -> str:
    """A text that names something, as the command line takes it."""
    if not as_text(value).strip() or "\0" in value:
        raise ValueError("a name; give one, or leave it out")
    return value


def as_whole(value: Any) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a whole number; give one such as 8")
    return value


def as_number(value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("a number; give one such as 3.5")
    return value


def as_flag(value: Any) -> bool:
    """Yes or no."""
    if not isinstance(value, bool):
        raise ValueError("true or false; give one of them")
    return value


def counts(value: Any) -> str:
    """One number or a list of them: 10, [13, 10, 8] or "13,10,8"; the command reads it."""
    listed = value if isinstance(value, list) else [value]
    if isinstance(value, str):
        return value
    if not listed or not all(isinstance(n, int) and not isinstance(n, bool) for n in listed):
        raise ValueError("a number of steps, or a list of them; give 10 or [13, 10, 8]")
    return ",".join(map(str, listed))


def as_settings(value: Any) -> dict[str, Any]:
    """Names and values, of arguments of a pipeline or of fields of a configuration; lists stay what
    a configuration's JSON would have."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError("a list of names and values; write {name: value}")
    return dict(value)


def as_pairs(value: Any) -> list[str]:
    """Arguments of the pipeline as `--set` has them."""
    return [f"{key}={item!r}" for key, item in as_settings(value).items()]


def as_shape(value: Any) -> tuple[int, ...]:
    """Sizes of a tensor, without the batch."""
    listed = value if isinstance(value, list) else []
    if not listed or not all(isinstance(n, int) and n is not True and n > 0 for n in listed):
        raise ValueError("the sizes of a tensor; give a list such as [512, 4096]")
    return tuple(listed)


def mapping(told: str, key: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping under a key, with underscores in its keys; empty where it is not there."""
    found = checked(told, key, values.get(key, {}), as_settings)
    return {name.replace("-", "_"): value for name, value in found.items()}


def known(told: str, key: str, values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> Any:
    """The values of a mapping under a key, each of its kind.

    Raises: LesaError for a name that it does not have, or a value of another type.
    """
    from lesa.cli.names import did_you_mean

    names = [name.replace("_", "-") for name in kinds]
    for name in values:
        if name not in kinds:
            shown_name = name.replace("_", "-")
            near = did_you_mean(shown_name, names)
            raise LesaError(f"{told}: {key} has no {shown_name}{near}; it takes {', '.join(names)}")
    return {
        name: checked(told, f"{key}.{name}", value, kinds[name]) for name, value in values.items()
    }
