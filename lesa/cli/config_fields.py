"""Fields of a configuration that a recipe gives, checked by the class that will get them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from lesa.cli.names import did_you_mean
from lesa.errors import LesaError

__all__ = ["check_fields"]

_LISTS = re.compile("list|tuple|sequence", re.I)  # annotations: a number for each block
_NONE = re.compile("None|Optional")


def check_fields(told: str, key: str, kind: type, values: Mapping[str, Any]) -> None:
    """LesaError for a field that the class does not have, and for a value that is not of the kind
    of its default: another type, or a number below 0 where the default is none.

    told, key: how messages begin, and where in the recipe the fields stand.
    """
    parameters = {n: p for n, p in inspect.signature(kind).parameters.items() if n != "self"}
    for name, value in values.items():
        field = f"{told}: {key}.{name}={value!r}: {kind.__name__}"
        if name not in parameters:
            near = did_you_mean(name, parameters)
            raise LesaError(f"{field} has no such field{near}; it has {', '.join(parameters)}")
        usual, annotation = parameters[name].default, str(parameters[name].annotation)
        if usual is inspect.Parameter.empty or (value is None and _NONE.search(annotation)):
            continue
        if "float" in annotation and _is_number(usual):
            usual = float(usual)
        listed = isinstance(value, list) and _is_number(usual) and _LISTS.search(annotation)
        items = value if listed else [value]
        if not all(_is_like(item, usual) for item in items):
            kind_of = type(usual).__name__
            raise LesaError(f"{field} takes {kind_of} values there; give one such as {usual!r}")
        if _is_number(usual) and usual >= 0 and any(item < 0 for item in items):
            raise LesaError(f"{field} takes nothing below 0 there; give one such as {usual!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_like(value: Any, usual: Any) -> bool:
    """Whether a value is of the kind of a field's usual one, as far as that tells."""
    if isinstance(usual, bool) or isinstance(value, bool):
        return isinstance(value, bool) and (usual is None or isinstance(usual, bool))
    if isinstance(usual, int):
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(usual, float):
        return _is_number(value)
    return not isinstance(usual, str) or isinstance(value, str)
