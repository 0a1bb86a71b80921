"""Which generation is this? What stays the same in one run of a denoising loop."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lesa.hooks.added_noise import adds_noise, is_multistep
from lesa.hooks.noise_levels import levels_problem, noise_levels, times_of
from lesa.hooks.pipeline_state import (
    executed_steps,
    first_step,
    frame_times,
    guidance_parts,
    guidance_scales,
    order_of,
    pictures_of,
)
from lesa.util.forks import renew_in_children

__all__ = ["Generation", "Generations", "Loop"]

SHARED = (
    "two threads use one scheduler: give each thread a pipeline of its own, "
    "type(pipe).from_pipe(pipe, dtype=pipe.dtype, scheduler=copy.deepcopy(pipe.scheduler))"
)
SHARED_BY_SLOTS = (
    "two requests use one scheduler: give each slot one of its own, "
    "lesa.Slot(pipe, scheduler=copy.deepcopy(pipe.scheduler))"
)


@dataclass(eq=False)
class _Use:
    """The use of one scheduler with one `timesteps` object, by the request that began it, in its
    thread; `shared` says who else is in it, if anyone."""

    timesteps: object
    user: object
    thread: int
    shared: str | None = None


class Loop(NamedTuple):
    """What is at hand where a generation begins.

    Attributes:
        pipe: the pipeline that tells the steps, if any.
        scheduler: the scheduler in use, if any.
        timesteps: the scheduler's.
        calling: whether the pipeline's own loop is at work.
        names: the local variables of its call, where they are known.
        call: the named arguments of the first call.
        given: how many steps the cache context tells, or None.
        indexed: whether the caller tells the index of every step.
        sigmas: the noise levels of one's own loop, without a scheduler; else empty.
        user: tells the request from others.
    """

    pipe: Any
    scheduler: Any
    timesteps: Any
    calling: bool
    names: Mapping[str, Any]
    call: Mapping[str, Any]
    given: Any
    indexed: bool
    sigmas: tuple[float, ...]
    user: object


@dataclass(slots=True)
class Generation:
    """What stays the same in one run of the denoising loop, as one request sees it.

    Attributes:
        timesteps: the scheduler's, by whose identity the generation is known.
        pipe: the pipeline whose scheduler tells the steps, held weakly.
        first: where in `timesteps` it begins.
        num_steps: how many steps it has.
        sigmas: their noise levels, one more than steps; empty where there are none.
        levels_problem: why there are none, in a few words.
        times: what tells its steps from those of another generation: its levels, or the
            scheduler's times.
        parts: guidance parts in a call.
        pictures: how many pictures the loop makes at once; 0 if unknown.
        counting: whether nothing but the number of calls tells the step.
        sampler: the class of its scheduler, "" without one.
        noise: whether that one adds noise.
        multistep: whether it extrapolates over its steps.
        guidance: the scales of guidance by the names of the pipeline's arguments.
        embedded: whether the denoiser is told a scale of guidance.
        guided: whether a call holds several parts of every picture.
        by_frame: whether every frame has a time of its own.
        use: who uses the scheduler.
        problem: why its steps cannot be trusted, else None.
    """

    timesteps: object = None
    pipe: weakref.ref[Any] | None = None
    first: int = 0
    num_steps: int = 0
    sigmas: tuple[float, ...] = ()
    levels_problem: str | None = None
    times: tuple[float, ...] = ()
    parts: int = 1
    pictures: int = 0
    counting: bool = True
    sampler: str = ""
    noise: bool = False
    multistep: bool = False
    guidance: Mapping[str, float] = field(default_factory=dict)
    embedded: bool = False
    guided: bool = False
    by_frame: bool = False
    use: _Use | None = None
    problem: str | None = None


class Generations:
    """Begins generations, and knows which request uses which scheduler."""

    def __init__(self) -> None:
        # Unfinished ones by id of the scheduler: gone with the generations that they belong to.
        self._uses: weakref.WeakValueDictionary[int, _Use] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        renew_in_children(self)

    def renew(self) -> None:
        """In a forked process: no other thread uses a scheduler."""
        self._lock = threading.Lock()
        for key, use in list(self._uses.items()):
            if use.thread != threading.get_ident():
                del self._uses[key]

    def begin(self, loop: Loop) -> Generation:
        """Read what stays the same: no device is read at later steps.

        Raises:
            RunError: the scheduler has no known order.
        """
        pipe = loop.pipe
        found = Generation(loop.timesteps, None if pipe is None else weakref.ref(pipe))
        found.pictures = pictures_of(loop.names)
        if loop.calling:  # beside a loop of one's own its flags are those of another run
            rows = _rows(loop.call)
            found.parts = guidance_parts(pipe, rows, found.pictures)
            found.guidance = guidance_scales(loop.names, pipe)
            found.guided = found.parts > 1 or rows > found.pictures > 0
        found.embedded = loop.call.get("guidance") is not None
        if loop.scheduler is not None and loop.timesteps is not None:
            self._read(found, loop)
        elif loop.sigmas:
            found.sigmas = found.times = loop.sigmas
            found.num_steps = len(found.sigmas) - 1
        else:
            found.problem = "no scheduler and no num_inference_steps"
        return found

    def end(self, generation: Generation | None) -> None:
        """Forget who used the scheduler of a generation that is over."""
        use = None if generation is None else generation.use
        if use is not None:
            with self._lock:
                for key, known in list(self._uses.items()):
                    if known is use:
                        del self._uses[key]

    def _read(self, found: Generation, loop: Loop) -> None:
        """What the scheduler tells, and the pipeline around it."""
        pipe, scheduler, timesteps = loop.pipe, loop.scheduler, loop.timesteps
        found.first = first = first_step(pipe, scheduler, timesteps)
        steps = executed_steps(pipe, scheduler, timesteps, first, calling=loop.calling)
        found.num_steps = int(loop.given or steps)
        found.counting = not hasattr(scheduler, "step_index")
        order = order_of(scheduler)
        if order > 1:
            found.problem = f"scheduler of order {order}"
        found.sampler = type(scheduler).__name__
        found.noise = adds_noise(scheduler, loop.names)
        found.multistep = is_multistep(scheduler)
        found.by_frame = frame_times(pipe) is not None
        if found.by_frame and steps != len(timesteps) - first:  # frames begin one after another
            found.levels_problem = "the frames are at different noise levels"
        else:
            found.sigmas = noise_levels(scheduler, first, found.num_steps) or ()
            if not found.sigmas:
                found.levels_problem = levels_problem(scheduler, first, found.num_steps)
        found.times = found.sigmas or times_of(scheduler, first, found.num_steps)
        if not loop.indexed:
            found.use = self._claim(scheduler, timesteps, loop.user)

    def _claim(self, scheduler: Any, timesteps: Any, user: object) -> _Use:
        """The use of this scheduler, marked for all if another request is in it."""
        me = threading.get_ident()
        with self._lock:
            use = self._uses.get(id(scheduler))
            if use is None or use.timesteps is not timesteps:
                use = self._uses[id(scheduler)] = _Use(timesteps, user, me)
            if use.user is not user:
                use.shared = SHARED if use.thread != me else SHARED_BY_SLOTS
        return use


def _rows(call: Mapping[str, Any]) -> int:
    """Rows of the batch that a call gets, by its prompts."""
    prompts = call.get("encoder_hidden_states")
    return 0 if prompts is None or not hasattr(prompts, "shape") else len(prompts)
