"""A budget for one request: what holds inside of a `with` block instead of the pipeline's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from lesa.core.checks import MOST_STEPS, shown, whole
from lesa.errors import LesaError
from lesa.forecasters.target import Quality, Target

__all__ = ["Options", "current_options", "options"]


@dataclass(frozen=True)
class Options:
    """What a request asks for; with nothing given, what the pipeline was enabled with.

    Args:
        full_steps: how many steps are computed in full.
        target_speedup, target_psnr, quality: instead of a count, what it shall reach; see
            `lesa.forecasters.target.Target`.
        off: every call runs as if lesa were not there.

    Raises:
        LesaError: a value is invalid, or two of them exclude each other.
    """

    full_steps: int | None = None
    target_speedup: float | None = None
    target_psnr: float | None = None
    quality: Quality | None = None
    off: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.off, bool):
            raise LesaError(f"off={shown(self.off)}: not a truth value; give True or False")
        asked = {name: value for name, value in self.asked.items() if value is not None}
        given = asked | ({"off": True} if self.off else {})
        if len(given) > 1:
            one, other, *_ = [f"{name}={shown(value)}" for name, value in given.items()]
            raise LesaError(f"{one} and {other} exclude each other; give one of them")
        if self.full_steps is not None:
            count = whole("full_steps", self.full_steps, 1, MOST_STEPS)
            object.__setattr__(self, "full_steps", count)
        elif asked:
            target = Target(self.target_speedup, self.target_psnr, self.quality)
            object.__setattr__(self, "target_speedup", target.speedup)
            object.__setattr__(self, "target_psnr", target.psnr)

    @property
    def asked(self) -> dict[str, Any]:
        """The fields of a `LesaConfig` that they replace, None for those that were not given; empty
        where nothing was."""
        names = "full_steps", "target_speedup", "target_psnr", "quality"
        found = {name: getattr(self, name) for name in names}
        return found if any(value is not None for value in found.values()) else {}


_options: ContextVar[Options | None] = ContextVar("lesa_options", default=None)


def current_options() -> Options | None:
    """Those of the innermost block that this thread or asyncio task is in."""
    return _options.get()


def options(
    *,
    full_steps: int | None = None,
    target_speedup: float | None = None,
    target_psnr: float | None = None,
    quality: Quality | None = None,
    off: bool = False,
) -> AbstractContextManager[None]:
    """A budget for the generations that begin inside of the block, on any enabled pipeline.

        with lesa.options(full_steps=8):
            pipe("a red fox in the snow")

    Every thread and every asyncio task has its own, and an inner block replaces an outer one. A
    generation keeps the budget that it began with; with nothing given it is the pipeline's own.
    `off=True` holds for single calls too, which lesa then does not see. See `Options`.

    Raises:
        LesaError: a value is invalid: at once. What only a pipeline can tell, as a count above its
            number of steps, is refused when a generation begins, before its first step runs.
    """
    return _within(Options(full_steps, target_speedup, target_psnr, quality, off))


@contextmanager
def _within(asked: Options) -> Iterator[None]:
    before = _options.get()
    _options.set(asked)
    try:
        yield
    finally:
        _options.set(before)  # a generator may leave it in another task than it entered
