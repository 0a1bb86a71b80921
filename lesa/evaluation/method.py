"""What is compared: one contender, the bench it is prepared on, and what every peer offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from lesa.core.schedule import Schedule

Origin = Literal["own", "searched"]


@dataclass(frozen=True)
class Use:
    """What a cache that is not a forecaster tells while it is on a pipeline.

    cache_bytes: how many it holds now. full_steps: how many calls of the denoiser ran the whole
    model since it was put on, per guidance branch; None where its schedule says so beforehand.
    """

    cache_bytes: Callable[[], int]
    full_steps: Callable[[], float] | None = None


@dataclass(frozen=True)
class Method:
    """One contender at one amount of work.

    A forecaster brings `forecaster` and its bound `schedule`. Everything else brings `applied`:
    pipeline -> context manager that yields a `Use`. A shorter run has neither, and fewer
    `num_steps`.

    wanted: the number of full steps that it was built for, where no schedule tells: of an adaptive
        method the nominal one, whose measured mean the row reports.
    overrides: arguments of `pipe(...)` that differ from the plain run's, e.g. `sigmas`.
    one_by_one: an adaptive method, or a guard, decides for a whole batch; it is run prompt by
        prompt.
    note: what it does, in a few words, where the number of full steps does not say it all.
    """

    name: str
    num_steps: int
    forecaster: Any = None
    schedule: Schedule | None = None
    origin: Origin = "own"
    applied: Callable[[Any], AbstractContextManager[Use]] | None = None
    wanted: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    one_by_one: bool = False
    note: str = ""

    @property
    def full_steps(self) -> int:
        """How many steps run the whole model."""
        if self.schedule is not None:
            return len(self.schedule.full_steps)
        return self.num_steps if self.wanted is None else self.wanted

    @property
    def schedule_text(self) -> str:
        """Where the full steps come from, which they are, and the note: "own: 0,7,14" or
        "own: 10 steps; threshold 0.2"."""
        steps = f"{self.full_steps} steps"
        if self.schedule is not None:
            steps = ",".join(map(str, self.schedule.full_steps))
        return "; ".join(filter(None, (f"{self.origin}: {steps}", self.note)))

    @property
    def label(self) -> str:
        """A name that is unique within one comparison."""
        searched = " (searched steps)" if self.origin == "searched" and self.name != "lesa" else ""
        return f"{self.name}{searched} @{self.full_steps}"


@dataclass(frozen=True)
class Bench:
    """What a method may be prepared on, before any measured prompt is seen.

    settings: arguments of `pipe(...)`, num_inference_steps among them. calibration: prompts for
    thresholds and training, drawn with seed + i; none of them is measured. forecaster: lesa's.
    """

    num_steps: int
    pipe: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    calibration: Sequence[str] = ()
    forecaster: Any = None
    seed: int = 0


class Peer(Protocol):
    """One way to spend a number of full steps."""

    @property
    def takes_lists(self) -> bool:
        """Can it run on a given list of full steps?"""

    def unfit(self, bench: Bench) -> str | None:
        """Why it cannot run here (another architecture, a missing package), or None."""

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """The method at its own setting with at least `wanted` full steps, or on a given list."""
