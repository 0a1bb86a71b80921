"""Which steps of a generation are computed in full."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from lesa.core.checks import MOST_STEPS, real, shown, whole
from lesa.errors import LesaError


@dataclass(frozen=True, eq=False)
class Schedule:
    """A rule for the full steps, either unbound or bound to a number of steps.

    Step 0 is always full. Two bound schedules are equal when their step count and their full
    steps are, whatever rule made them; unbound ones are equal when their rules are.
    """

    rule: str
    value: int | float | tuple[int, ...]
    num_steps: int | None = None
    _full: tuple[int, ...] = field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        if not isinstance(self.rule, str) or self.rule not in _RULES:
            known = ", ".join(_RULES)
            raise LesaError(f"rule={shown(self.rule)}: unknown; use one of {known}")
        object.__setattr__(self, "value", _checked_value(self.rule, self.value))
        if self.num_steps is not None:
            steps = whole("num_steps", self.num_steps, 1, MOST_STEPS)
            object.__setattr__(self, "num_steps", steps)
            object.__setattr__(self, "_full", _RULES[self.rule](self.value, self.num_steps))

    @classmethod
    def every(cls, interval: int, num_steps: int | None = None) -> Schedule:
        """The paper's LESA schedule: W leading full steps, then every `interval`-th step.

        With T steps, W = clamp(ceil(T / N) - 1, 1, 4); step i is full iff i < W or
        (i - min(W, 3) + 1) % N == 0. Interval 1 computes every step. Raises LesaError for an
        interval below 1. Source: a fit to all full-step counts printed in the LESA paper.
        """
        return cls("every", interval, num_steps)

    @classmethod
    def explicit(cls, full_steps: Iterable[int], num_steps: int | None = None) -> Schedule:
        """Exactly these full steps, in any order; LesaError unless they hold 0 and none is < 0."""
        return cls("explicit", full_steps, num_steps)  # type: ignore[arg-type]  # made a tuple

    @classmethod
    def fora(cls, interval: int, num_steps: int | None = None) -> Schedule:
        """FORA's published schedule {0, N, 2N, ...}."""
        return cls("fora", interval, num_steps)

    @classmethod
    def taylorseer(cls, interval: int, num_steps: int | None = None) -> Schedule:
        """TaylorSeer's published schedule {0, 1, 2, 2 + N, 2 + 2N, ...}."""
        return cls("taylorseer", interval, num_steps)

    @classmethod
    def spectrum(cls, growth: float, num_steps: int | None = None) -> Schedule:
        """Spectrum's published schedule: 0..4, then gaps floor(2 + j * growth), j = 0, 1, ..."""
        return cls("spectrum", growth, num_steps)

    def bind(self, num_steps: int) -> Schedule:
        """This rule on a run of `num_steps` steps; LesaError if it cannot serve that count."""
        num_steps = whole("num_steps", num_steps, 1, MOST_STEPS)
        if self.num_steps is None:
            return Schedule(self.rule, self.value, num_steps)
        if self.num_steps != num_steps:
            raise LesaError(
                f"schedule={self}: bound to {self.num_steps} steps, the run has {num_steps}; "
                "pass a schedule without num_steps, or one for this step count"
            )
        return self

    def resampled(self, num_steps: int) -> Schedule:
        """The same full steps as fractions of the run, on another number of steps."""
        scale = whole("num_steps", num_steps, 1, MOST_STEPS) / self.steps
        return Schedule.explicit(spread([s * scale for s in self._full], num_steps), num_steps)

    @property
    def steps(self) -> int:
        """The number of steps; LesaError while unbound."""
        if self.num_steps is None:
            raise LesaError(
                f"schedule={self}: no num_steps; call bind(num_steps) with the run's step count"
            )
        return self.num_steps

    @property
    def full_steps(self) -> tuple[int, ...]:
        """The full steps in increasing order; LesaError while unbound."""
        return self._full if self.steps else ()

    @property
    def skipped_steps(self) -> tuple[int, ...]:
        """The steps that are forecast, in increasing order; LesaError while unbound."""
        full = set(self._full)
        return tuple(s for s in range(self.steps) if s not in full)

    def is_full(self, step: int) -> bool:
        """Is this step computed in full? LesaError while unbound, or for a step past the end."""
        step = whole("step", step, 0, self.steps - 1)
        at = bisect_left(self.full_steps, step)
        return at < len(self._full) and self._full[at] == step

    def cached_before(self, step: int, count: int) -> tuple[int, ...]:
        """The full steps before `step`, newest first, at most `count` of them.

        LesaError while unbound, or for a step or a count that is none.
        """
        step, count = whole("step", step, 0, self.steps), whole("count", count, 0)
        end = bisect_left(self.full_steps, step)
        return self._full[max(end - count, 0) : end][::-1]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description that `from_dict` turns back into an equal schedule."""
        value = list(self.value) if isinstance(self.value, tuple) else self.value
        return {"rule": self.rule, "value": value, "num_steps": self.num_steps}

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> Schedule:
        """The inverse of `to_dict`; LesaError when a field is missing."""
        if not isinstance(description, Mapping):
            raise LesaError(
                f"schedule={shown(description)}: not a mapping; write it with Schedule.to_dict()"
            )
        try:
            value, num_steps = description["value"], description.get("num_steps")
            return cls(description["rule"], value, num_steps)
        except KeyError as missing:
            raise LesaError(
                f"schedule={shown(dict(description))}: it has no field {missing}; "
                "write it with Schedule.to_dict()"
            ) from None

    def __str__(self) -> str:
        return f"{self.rule}({self.value})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        return (self.num_steps, self._full) if self._full else (self.rule, self.value)


def spread(positions: Iterable[float], num_steps: int) -> tuple[int, ...]:
    """The nearest strictly increasing steps in 0..num_steps - 1 to increasing positions."""
    steps = [round(position) for position in positions]
    if len(steps) > num_steps:
        raise LesaError(
            f"full_steps={len(steps)}: more than num_steps={num_steps}; ask for fewer full steps"
        )
    for i in range(1, len(steps)):
        steps[i] = max(steps[i], steps[i - 1] + 1)
    for i, step in enumerate(steps):
        steps[i] = min(step, num_steps - len(steps) + i)
    return tuple(steps)


def _checked_value(rule: str, value: Any) -> int | float | tuple[int, ...]:
    if rule == "spectrum":
        growth = real("growth", value, "Spectrum uses 0.75 to 4")
        if growth < 0:
            raise LesaError(f"growth={shown(value)}: below 0; Spectrum uses 0.75 to 4")
        return value if isinstance(value, int) else growth
    if rule != "explicit":
        return whole("interval", value, 1)
    try:
        listed = list(value)
    except (TypeError, RuntimeError):
        raise LesaError(
            f"full_steps={shown(value)}: not a list of steps; list them, as [0, 1, 5]"
        ) from None
    steps = tuple(sorted({whole("full_steps entry", step, 0, MOST_STEPS) for step in listed}))
    if not steps or steps[0] != 0:
        raise LesaError(
            f"full_steps={shown(steps)}: it lacks step 0, which has nothing to reuse; add 0"
        )
    return steps


def _every(interval: int, num_steps: int) -> tuple[int, ...]:
    lead = min(max(ceil(num_steps / interval) - 1, 1), 4)
    shift = min(lead, 3) - 1
    return tuple(s for s in range(num_steps) if s < lead or (s - shift) % interval == 0)


def _explicit(full_steps: tuple[int, ...], num_steps: int) -> tuple[int, ...]:
    if len(full_steps) > num_steps:
        raise LesaError(
            f"full_steps={full_steps}: it holds {len(full_steps)} steps but num_steps={num_steps}; "
            "list fewer full steps"
        )
    if full_steps[-1] >= num_steps:
        raise LesaError(
            f"full_steps={full_steps}: it holds step {full_steps[-1]} but num_steps={num_steps} "
            f"ends at step {num_steps - 1}; drop the later steps"
        )
    return full_steps


def _fora(interval: int, num_steps: int) -> tuple[int, ...]:
    return tuple(range(0, num_steps, interval))


def _taylorseer(interval: int, num_steps: int) -> tuple[int, ...]:
    return tuple(s for s in range(num_steps) if s < 2 or (s - 2) % interval == 0)


def _spectrum(growth: float, num_steps: int) -> tuple[int, ...]:
    steps, gap = [0, 1, 2, 3, 4], 2.0
    while steps[-1] + int(gap) < num_steps:
        steps.append(steps[-1] + int(gap))
        gap += growth
    return tuple(s for s in steps if s < num_steps)


_RULES: dict[str, Any] = {
    "every": _every,
    "explicit": _explicit,
    "fora": _fora,
    "taylorseer": _taylorseer,
    "spectrum": _spectrum,
}


def check_count(full_steps: int, num_steps: int, field: str = "full_steps") -> None:
    """Raises LesaError unless 1 <= full_steps <= num_steps."""
    if num_steps < 1:
        raise LesaError(f"num_inference_steps={num_steps}: below 1; give at least 1")
    if not 1 <= full_steps <= num_steps:
        raise LesaError(
            f"{field}={full_steps}: {full_steps} of {num_steps} steps is not possible;"
            f" choose from 1 to num_inference_steps = {num_steps}"
        )
