"""Which step is this? Read from the cache context, the scheduler in use, or by counting calls."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from lesa.hooks.generation import SHARED, Generation, Generations
from lesa.hooks.noise_levels import own_noise_levels

__all__ = ["Step", "StepClock"]

# More calls than this under one name at one step: the scheduler is not the one of the loop.
_MAX_ORDINAL = 4


@dataclass(slots=True)  # frozen, it would take 1 us of each step, not .3
class Step:
    """One call of the denoiser: step `index` of `num_steps`, in one guidance branch.

    `sigmas` holds `num_steps + 1` noise levels in [0, 1], strictly decreasing. `fresh` is true on
    the first call of a generation. `problem` says why the position cannot be trusted, else None.
    `parts` is what `lesa.hooks.pipeline_state.guidance_parts` tells of the pipeline.
    """

    index: int
    num_steps: int
    sigmas: tuple[float, ...]
    branch: str
    fresh: bool
    problem: str | None = None
    parts: int = 1


class _Position:
    """Which index: where in its generation a thread is, by what its calls tell."""

    __slots__ = ("_calls", "_last_time", "index")

    def __init__(self) -> None:
        self.index = 0
        self._calls: dict[str, int] = {}
        self._last_time: float | None = None

    def find(
        self, generation: Generation, scheduler: Any, name: str, fields: Mapping[str, Any]
    ) -> int:
        """The index of a call in the branch `name`."""
        told = fields.get("step_index")
        if told is not None:
            return int(told)
        if generation.counting:  # a branch that comes round again is at the next step
            return self.index + 1 if name in self._calls else self.index
        position = scheduler.step_index
        return 0 if position is None else int(position) - generation.first

    def is_over(self, num_steps: int, index: int, kwargs: Mapping[str, Any] | None) -> bool:
        """Whether a loop without a scheduler has begun anew: too many steps, or the time rose."""
        time = (kwargs or {}).get("timestep")
        if isinstance(time, torch.Tensor):
            time = float(time.flatten()[0]) if time.device.type == "cpu" and time.numel() else None
        rises = time is not None and self._last_time is not None and time > self._last_time
        self._last_time = time
        return rises or index >= num_steps

    def count(self, index: int, name: str) -> int:
        """Go to `index`; how many calls in the branch `name` there were at it before this one."""
        if index != self.index:
            self._calls.clear()
            self.index = index
        ordinal = self._calls.get(name, 0)
        self._calls[name] = ordinal + 1
        return ordinal


class _Thread(threading.local):
    name: str = ""
    fields: Mapping[str, Any] = {}
    generation: Generation | None = None
    position: _Position


class _Context:
    """A class, since a generator costs twice the time and every step enters one."""

    __slots__ = ("_before", "_inner", "_now", "_thread")

    def __init__(
        self,
        thread: _Thread,
        name: str,
        fields: Mapping[str, Any],
        inner: AbstractContextManager[Any] | None,
    ) -> None:
        self._thread, self._now, self._inner = thread, (name, fields), inner

    def __enter__(self) -> None:
        thread = self._thread
        if self._inner is not None:
            self._inner.__enter__()
        self._before = thread.name, thread.fields
        thread.name, thread.fields = self._now

    def __exit__(self, *error: Any) -> None:
        self._thread.name, self._thread.fields = self._before
        if self._inner is not None:
            self._inner.__exit__(*error)


class StepClock:
    """Tells the step of every call, separately in every thread.

    Sources, in this order: `cache_context` fields (`step_index`, `num_inference_steps`); the step
    index of the scheduler of the pipeline whose `__call__` this is (weakly held; the scheduler is
    looked up at every call) or of `scheduler`; the number of calls since the generation began. A
    generation begins when `scheduler.timesteps` is a new object, when the step goes backwards or,
    without a scheduler, after `num_steps` steps or when a `timestep` that lies on the CPU rises.

    Args:
        pipe: the pipeline whose loop calls the model, if that is no `__call__` of a pipeline.
        scheduler: the scheduler of one's own loop, without a pipeline.
        num_steps: steps of one's own loop, without a scheduler.
        sigmas: its `num_steps + 1` noise levels in [0, 1]; evenly spaced if None.

    Raises:
        LesaError: `num_steps` or `sigmas` is invalid.
    """

    def __init__(
        self,
        pipe: Any = None,
        *,
        scheduler: Any = None,
        num_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        own = own_noise_levels(num_steps, sigmas)
        self._scheduler = scheduler
        self._generations = Generations(scheduler, own)
        self._thread = _Thread()
        self._several = False
        if pipe is not None:
            self.add_pipe(pipe)

    @property
    def pipes(self) -> list[Any]:
        """The pipelines that are still alive."""
        return self._generations.pipes

    def add_pipe(self, pipe: Any) -> None:
        """Let one more pipeline, which shares the model, be a source of steps."""
        self._generations.add_pipe(pipe)
        self._several = self._generations.several

    def reset(self) -> None:
        """Forget this thread's generation: the next call begins a new one."""
        generation, self._thread.generation = self._thread.generation, None
        self._generations.end(generation)

    def context(
        self,
        name: str,
        fields: Mapping[str, Any],
        inner: AbstractContextManager[Any] | None = None,
    ) -> AbstractContextManager[None]:
        """Give the calls inside a branch name and perhaps a step, as `cache_context` does.

        `inner` is entered and left along with it.
        """
        return _Context(self._thread, name, fields, inner)

    def tick(self, kwargs: Mapping[str, Any] | None = None) -> Step:
        """Step of the call that is about to run; to be asked exactly once per call.

        Raises:
            RunError: a generation begins with a scheduler of no known order.
        """
        thread = self._thread
        name, fields, generation = thread.name, thread.fields, thread.generation
        if generation is None or self._several:
            pipe = self._generations.find_pipe()
        else:
            pipe = None if generation.pipe is None else generation.pipe()
        scheduler = self._scheduler if pipe is None else getattr(pipe, "scheduler", None)
        timesteps = None if scheduler is None else getattr(scheduler, "timesteps", None)
        fresh = generation is None or generation.timesteps is not timesteps
        if generation is None or fresh:
            generation = self._begin(pipe, scheduler, timesteps)
        position = thread.position
        index = position.find(generation, scheduler, name, fields)
        if not fresh and (
            index < position.index
            or (scheduler is None and position.is_over(generation.num_steps, index, kwargs))
        ):
            fresh = True
            generation = self._begin(pipe, scheduler, timesteps)
            position = thread.position
            index = position.find(generation, scheduler, name, fields)
        ordinal = position.count(index, name)
        branch = name or "default"
        if ordinal:
            branch = f"{branch}#{ordinal}"
        problem = _problem(generation, index, ordinal)
        return Step(
            index, generation.num_steps, generation.sigmas, branch, fresh, problem, generation.parts
        )

    def _begin(self, pipe: Any, scheduler: Any, timesteps: Any) -> Generation:
        """This thread's next generation, at its first step."""
        thread = self._thread
        given = thread.fields.get("num_inference_steps")
        thread.generation, thread.position = None, _Position()
        thread.generation = self._generations.begin(pipe, scheduler, timesteps, given)
        return thread.generation


def _problem(generation: Generation, index: int, ordinal: int) -> str | None:
    if generation.problem is not None:
        return generation.problem
    if generation.use is not None and generation.use.shared:
        return SHARED
    if not 0 <= index < generation.num_steps:
        return "step outside the run"
    return "scheduler does not advance" if ordinal >= _MAX_ORDINAL else None
