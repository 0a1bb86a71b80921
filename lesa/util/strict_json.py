"""JSON that every program reads alike: no NaN, no key twice, nothing that exhausts a stack."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from lesa.errors import LesaError
from lesa.util.files import one_line

__all__ = ["parse_json", "to_json"]

DEPTH = 64  # containers in each other
MOST_DIGITS = 4300  # of a whole number: what Python reads where nobody sets another limit


def to_json(value: Any) -> str:
    """Strict JSON: a number that is not finite (the PSNR of identical images) becomes null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if any("\ud800" <= character <= "\udfff" for character in text):  # a name that is not UTF-8
        return json.dumps(json.loads(text), indent=2) + "\n"
    return text


def parse_json(data: bytes, what: str, remedy: str) -> Any:
    """JSON in UTF-8, -16 or -32, with or without a byte order mark.

    Raises: LesaError, beginning with the words `what`, for anything else: NaN and infinity, a key
        that is there twice, and more than DEPTH containers in each other too.
    """
    try:
        value = json.loads(
            data, object_pairs_hook=_unique, parse_constant=_no_number, parse_int=_whole
        )
        if _depth(value) > DEPTH:
            raise ValueError(f"more than {DEPTH} brackets in each other")
    except RecursionError:
        raise LesaError(f"{what} (too many brackets in each other); {remedy}") from None
    except ValueError as error:
        raise LesaError(f"{what} ({one_line(error)}); {remedy}") from None
    return value


def _depth(value: Any) -> int:
    """How many containers lie in each other."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [v for item in level for v in (item.values() if isinstance(item, dict) else item)]
    return depth


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(k for k, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {ascii(twice[:60])} is there twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:  # which Python itself refuses only since 3.10.7
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
