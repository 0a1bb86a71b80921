"""Values of options that nothing takes, told before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from lesa.core.checks import MOST_SEED
from lesa.errors import LesaError

MOST_SIDE, MOST_PIXELS = 2**16, 2**30  # of a picture or video; more would fill memory
MOST_STEP_SECONDS = 86_400
DRAWING = ("matplotlib", "jinja2")


def check_at_least(least: int, **numbers: int | None) -> None:
    """LesaError for a number below the least; None is not looked at."""
    for name, value in numbers.items():
        if value is not None and value < least:
            raise LesaError(f"{_option(name)}={value}: below {least}; give at least {least}")


def check_size(height: int | None, width: int | None, frames: int | None) -> None:
    """LesaError for less than a pixel or frame, and for more pixels than anything has."""
    given = {"height": height, "width": width, "frames": frames}
    check_at_least(1, **given)
    told = {name: value for name, value in given.items() if value is not None}
    for name, value in told.items():
        if value > MOST_SIDE:
            raise LesaError(f"{name}={value}: above {MOST_SIDE}; give a smaller size")
    if math.prod(told.values()) > MOST_PIXELS:
        listed = ", ".join(f"{name}={value}" for name, value in told.items())
        raise LesaError(f"{listed}: more than {MOST_PIXELS} pixels; give a smaller size")


def check_at_most(most: int, **numbers: int) -> None:
    """LesaError for a number above the most, which would take days, or fail at the end."""
    for name, value in numbers.items():
        if value > most:
            raise LesaError(f"{_option(name)}={value}: above {most}; give at most {most}")


def check_given(values: Mapping[str, Any], more: Sequence[str], order: Sequence[Any]) -> None:
    """LesaError for an empty text, which only a negative prompt may be, and for an option that is
    given twice where it can be given once.

    values, more, order: what a command line's parser found: texts by the names of parameters,
    arguments beyond them, and the parameters in order.
    """
    for parameter in order:
        name, value = parameter.name, values.get(parameter.name)
        field = _option(name.removesuffix("_option"))
        if name != "negative_prompt" and any(_is_blank(text) for text in _listed(value)):
            raise LesaError(f"{field}='': it is empty; give a value or leave it out")
        once = not (getattr(parameter, "multiple", False) or getattr(parameter, "is_flag", False))
        if once and sum(other is parameter for other in order) > 1:
            raise LesaError(f"{field}={value!r}: it is given more than once; give it once")
    if any(map(_is_blank, more)):
        raise LesaError("argument='': it is empty; leave it out")


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def check_finite(**numbers: float | None) -> None:
    """LesaError for what is not a number, or endless."""
    for name, value in numbers.items():
        if value is not None and not math.isfinite(value):
            raise LesaError(f"{_option(name)}={value}: not a finite number; give one such as 3.5")


def check_step_seconds(seconds: float | None, dry_run: bool) -> None:
    """LesaError for no time, or one that nothing is planned with."""
    check_finite(step_seconds=seconds)
    if seconds is not None and seconds > MOST_STEP_SECONDS:
        most = MOST_STEP_SECONDS
        raise LesaError(f"step-seconds={seconds:g}: above {most}; give at most {most}, a day")
    if seconds is not None and (seconds <= 0 or not dry_run):
        wrong = "it is for a plan; give --dry-run too" if seconds > 0 else "not above 0; give more"
        raise LesaError(f"step-seconds={seconds:g}: {wrong}")


def check_seed(seed: int) -> None:
    """LesaError for a seed that torch's generators do not take, or that is below 0."""
    if not 0 <= seed <= MOST_SEED:
        raise LesaError(f"seed={seed}: out of range; give 0 to {MOST_SEED}")


def require_packages(field: str, *names: str, extra: str = "report") -> None:
    """LesaError where one of these packages of an extra of lesa is not installed.

    field: the field and value that need them.
    """
    if missing := [name for name in names if find_spec(name) is None]:
        raise LesaError(
            f"{field}: it needs {' and '.join(missing)}, not installed here; run"
            f" `pip install {' '.join(missing)}` (the extra {extra} of lesa)"
        )


def _option(name: str) -> str:
    return name.replace("_", "-")
