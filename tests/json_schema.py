"""The part of JSON Schema 2020-12 that the schemas of docs/ use; any other keyword is an error."""

from __future__ import annotations

import re
from typing import Any

TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "number": (int, float),
    "integer": int,
}
TOLD = {"$schema", "title", "description", "$defs"}


def errors(value: Any, schema: dict[str, Any], root: dict[str, Any] | None = None, at: str = "$"):
    """Places and keywords that a value breaks."""
    root = schema if root is None else root
    for keyword, wanted in schema.items():
        if keyword in TOLD:
            continue
        if keyword == "$ref":
            yield from errors(value, root["$defs"][wanted.removeprefix("#/$defs/")], root, at)
        elif keyword in ("properties", "additionalProperties", "items"):
            for name, inner in _inner(value, keyword, wanted, schema):
                yield from errors(value[name], inner, root, f"{at}.{name}")
        elif not _holds(value, keyword, wanted):
            yield f"{at}: {keyword}"


def _inner(value: Any, keyword: str, wanted: Any, schema: dict[str, Any]):
    if keyword == "items":
        return [(i, wanted) for i in range(len(value))] if isinstance(value, list) else []
    if not isinstance(value, dict):
        return []
    if keyword == "properties":
        return [(name, wanted[name]) for name in value if name in wanted]
    known = schema.get("properties", {})
    return [(name, wanted) for name in value if name not in known]


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    whole = kind == "integer" and isinstance(value, float) and value.is_integer()  # 3.0 is one
    return whole or isinstance(value, TYPES[kind])


def _holds(value: Any, keyword: str, wanted: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    checks = {
        "type": lambda: any(
            _is(value, kind) for kind in ([wanted] if isinstance(wanted, str) else wanted)
        ),
        "const": lambda: value == wanted and type(value) is type(wanted),
        "enum": lambda: value in wanted,
        "required": lambda: not isinstance(value, dict) or set(wanted) <= set(value),
        "minItems": lambda: not isinstance(value, list) or len(value) >= wanted,
        "minimum": lambda: not number or value >= wanted,
        "pattern": lambda: not isinstance(value, str) or bool(re.search(wanted, value)),
        "maximum": lambda: not number or value <= wanted,
    }
    return checks[keyword]()
