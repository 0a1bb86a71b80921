"""Which step is this? Read from the cache context, the scheduler in use, or by counting calls."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from lesa.hooks.noise_levels import noise_levels, own_noise_levels
from lesa.hooks.pipeline_state import (
    executed_steps,
    first_step,
    guidance_parts,
    order_of,
    pipe_on_stack,
)

__all__ = ["Step", "StepClock"]

# More calls than this under one name at one step: the scheduler is not the one of the loop.
_MAX_ORDINAL = 4

_SHARED = (
    "two threads use one scheduler: give each thread a pipeline of its own, "
    "type(pipe).from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler))"
)


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


@dataclass
class _Run:
    """The use of one scheduler with one `timesteps` object, by the thread that began it."""

    timesteps: object
    thread: int
    shared: bool = False


@dataclass
class _Generation:
    """One run of the denoising loop, as one thread sees it."""

    timesteps: object = None
    pipe: weakref.ref[Any] | None = None
    run: _Run | None = None
    first: int = 0
    num_steps: int = 0
    parts: int = 1
    sigmas: tuple[float, ...] = ()
    problem: str | None = None
    counting: bool = True
    index: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    last_time: float | None = None


class _Thread(threading.local):
    name: str = ""
    fields: Mapping[str, Any] = {}
    generation: _Generation | None = None


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
        LesaError: `num_steps` or `sigmas` is no valid run.
    """

    def __init__(
        self,
        pipe: Any = None,
        *,
        scheduler: Any = None,
        num_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        self._pipes: list[weakref.ref[Any]] = []
        self._scheduler = scheduler
        self._own_sigmas = own_noise_levels(num_steps, sigmas)
        self._thread = _Thread()
        self._runs: dict[int, _Run] = {}  # unfinished ones, by id of the scheduler
        self._lock = threading.Lock()
        if pipe is not None:
            self.add_pipe(pipe)

    @property
    def pipes(self) -> list[Any]:
        """The pipelines that are still alive."""
        return [pipe for known in self._pipes if (pipe := known()) is not None]

    def add_pipe(self, pipe: Any) -> None:
        """Let one more pipeline, which shares the model, be a source of steps."""
        if all(known is not pipe for known in self.pipes):
            self._pipes.append(weakref.ref(pipe))

    def reset(self) -> None:
        """Forget this thread's generation: the next call begins a new one."""
        generation, self._thread.generation = self._thread.generation, None
        with self._lock:
            for key, run in list(self._runs.items()):
                if generation is not None and run is generation.run:
                    del self._runs[key]

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
        name = thread.name
        run = thread.generation
        pipe = self._pipe(run)
        scheduler = self._scheduler if pipe is None else getattr(pipe, "scheduler", None)
        timesteps = None if scheduler is None else getattr(scheduler, "timesteps", None)
        fresh = run is None or run.timesteps is not timesteps
        if run is None or fresh:
            run = self._begin(pipe, scheduler, timesteps)
        index = _index(run, scheduler, name, thread.fields)
        if not fresh and (index < run.index or _is_over(run, scheduler, index, kwargs)):
            fresh = True
            run = self._begin(pipe, scheduler, timesteps)
            index = _index(run, scheduler, name, thread.fields)
        if index != run.index:
            run.calls.clear()
            run.index = index
        ordinal = run.calls.get(name, 0)
        run.calls[name] = ordinal + 1
        branch = name or "default"
        if ordinal:
            branch = f"{branch}#{ordinal}"
        problem = _problem(run, index, ordinal)
        return Step(index, run.num_steps, run.sigmas, branch, fresh, problem, run.parts)

    def _begin(self, pipe: Any, scheduler: Any, timesteps: Any) -> _Generation:
        """Read what stays the same during a generation: no device is read at later steps."""
        run = _Generation(timesteps, None if pipe is None else weakref.ref(pipe))
        self._thread.generation = run
        run.parts = guidance_parts(pipe)
        given = self._thread.fields.get("num_inference_steps")
        if scheduler is not None and timesteps is not None:
            run.first = first_step(pipe, scheduler, timesteps)
            run.num_steps = int(given or executed_steps(pipe, timesteps, run.first))
            run.sigmas = noise_levels(scheduler, run.first, run.num_steps) or ()
            run.counting = not hasattr(scheduler, "step_index")
            run.run = self._claim(scheduler, timesteps)
            order = order_of(scheduler)
            if order > 1:
                run.problem = f"scheduler of order {order}"
        elif self._own_sigmas:
            run.sigmas = self._own_sigmas
            run.num_steps = len(run.sigmas) - 1
        else:
            run.problem = "no scheduler and no num_inference_steps"
        if run.problem is None and not run.sigmas:
            run.problem = "no decreasing noise levels in the scheduler"
        return run

    def _pipe(self, run: _Generation | None) -> Any:
        """The pipeline whose loop this call belongs to; looked for at each call if several may."""
        if len(self._pipes) < 2 and run is not None:
            return None if run.pipe is None else run.pipe()
        if self._own_sigmas or self._scheduler is not None:
            return None
        pipes = self.pipes
        return pipe_on_stack(pipes) or (pipes[-1] if pipes else None)

    def _claim(self, scheduler: Any, timesteps: Any) -> _Run:
        """The run of this scheduler, marked for all if another thread is in it."""
        me = threading.get_ident()
        with self._lock:
            run = self._runs.get(id(scheduler))
            if run is None or run.timesteps is not timesteps:
                run = self._runs[id(scheduler)] = _Run(timesteps, me)
            run.shared |= run.thread != me
        return run


def _index(run: _Generation, scheduler: Any, name: str, fields: Mapping[str, Any]) -> int:
    told = fields.get("step_index")
    if told is not None:
        return int(told)
    if run.counting:  # a branch that comes round again is at the next step
        return run.index + 1 if name in run.calls else run.index
    position = scheduler.step_index
    return 0 if position is None else int(position) - run.first


def _is_over(
    run: _Generation, scheduler: Any, index: int, kwargs: Mapping[str, Any] | None
) -> bool:
    """Whether a loop without a scheduler has begun anew: too many steps, or the time rose."""
    if scheduler is not None:
        return False
    time = (kwargs or {}).get("timestep")
    if isinstance(time, torch.Tensor):
        time = float(time.flatten()[0]) if time.device.type == "cpu" and time.numel() else None
    rises = time is not None and run.last_time is not None and time > run.last_time
    run.last_time = time
    return rises or index >= run.num_steps


def _problem(run: _Generation, index: int, ordinal: int) -> str | None:
    if run.problem is not None:
        return run.problem
    if run.run is not None and run.run.shared:
        return _SHARED
    if not 0 <= index < run.num_steps:
        return "step outside the run"
    return "scheduler does not advance" if ordinal >= _MAX_ORDINAL else None
