"""Which generation is this? Which pipeline's loop calls, with which scheduler, over which steps."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any

from lesa.hooks.noise_levels import noise_levels
from lesa.hooks.pipeline_state import (
    executed_steps,
    first_step,
    guidance_parts,
    order_of,
    pipe_on_stack,
)
from lesa.util.forks import renew_in_children

__all__ = ["SHARED", "Generation", "Generations"]

SHARED = (
    "two threads use one scheduler: give each thread a pipeline of its own, "
    "type(pipe).from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler))"
)


@dataclass
class _Use:
    """The use of one scheduler with one `timesteps` object, by the thread that began it."""

    timesteps: object
    thread: int
    shared: bool = False


@dataclass(slots=True)
class Generation:
    """What stays the same in one run of the denoising loop, as one thread sees it.

    Attributes:
        timesteps: the scheduler's, by whose identity the generation is known.
        pipe: the pipeline whose loop it is, held weakly.
        first: where in `timesteps` it begins.
        num_steps: how many steps it has.
        sigmas: their noise levels, one more than steps.
        parts: guidance parts in a call.
        counting: whether nothing but the number of calls tells the step.
        use: who uses the scheduler.
        problem: why its steps cannot be trusted, else None.
    """

    timesteps: object = None
    pipe: weakref.ref[Any] | None = None
    first: int = 0
    num_steps: int = 0
    sigmas: tuple[float, ...] = ()
    parts: int = 1
    counting: bool = True
    use: _Use | None = None
    problem: str | None = None


class Generations:
    """Begins generations, and knows where their steps come from.

    Args:
        scheduler: the scheduler of one's own loop, without a pipeline.
        sigmas: the noise levels of one's own loop, without a scheduler; else empty.
    """

    def __init__(self, scheduler: Any, sigmas: tuple[float, ...]) -> None:
        self._pipes: list[weakref.ref[Any]] = []
        self._scheduler, self._sigmas = scheduler, sigmas
        self._uses: dict[int, _Use] = {}  # unfinished ones, by id of the scheduler
        self._lock = threading.Lock()
        renew_in_children(self)

    def renew(self) -> None:
        """In a forked process: no other thread uses a scheduler."""
        me = threading.get_ident()
        self._lock = threading.Lock()
        self._uses = {key: use for key, use in self._uses.items() if use.thread == me}

    @property
    def pipes(self) -> list[Any]:
        """The pipelines that are still alive."""
        return [pipe for known in self._pipes if (pipe := known()) is not None]

    @property
    def several(self) -> bool:
        """Whether several pipelines share the model, so that any of them may be the caller."""
        return len(self._pipes) > 1

    def add_pipe(self, pipe: Any) -> None:
        """Let one more pipeline, which shares the model, be a source of steps."""
        if all(known is not pipe for known in self.pipes):
            self._pipes.append(weakref.ref(pipe))

    def find_pipe(self) -> Any:
        """The pipeline whose loop the current call belongs to, if any."""
        if self._sigmas or self._scheduler is not None:
            return None
        pipes = self.pipes
        return pipe_on_stack(pipes) or (pipes[-1] if pipes else None)

    def begin(self, pipe: Any, scheduler: Any, timesteps: Any, given: Any) -> Generation:
        """Read what stays the same: no device is read at later steps.

        Args:
            pipe: the pipeline whose loop it is, if any.
            scheduler: the scheduler in use, if any.
            timesteps: the scheduler's.
            given: how many steps the cache context tells, or None.

        Raises:
            RunError: the scheduler has no known order.
        """
        found = Generation(timesteps, None if pipe is None else weakref.ref(pipe))
        found.parts = guidance_parts(pipe)
        if scheduler is not None and timesteps is not None:
            found.first = first_step(pipe, scheduler, timesteps)
            found.num_steps = int(given or executed_steps(pipe, timesteps, found.first))
            found.sigmas = noise_levels(scheduler, found.first, found.num_steps) or ()
            found.counting = not hasattr(scheduler, "step_index")
            order = order_of(scheduler)
            if order > 1:
                found.problem = f"scheduler of order {order}"
            found.use = self._claim(scheduler, timesteps)
        elif self._sigmas:
            found.sigmas = self._sigmas
            found.num_steps = len(found.sigmas) - 1
        else:
            found.problem = "no scheduler and no num_inference_steps"
        if found.problem is None and not found.sigmas:
            found.problem = "no decreasing noise levels in the scheduler"
        return found

    def end(self, generation: Generation | None) -> None:
        """Forget who used the scheduler of a generation that is over."""
        with self._lock:
            for key, use in list(self._uses.items()):
                if generation is not None and use is generation.use:
                    del self._uses[key]

    def _claim(self, scheduler: Any, timesteps: Any) -> _Use:
        """The use of this scheduler, marked for all if another thread is in it."""
        me = threading.get_ident()
        with self._lock:
            use = self._uses.get(id(scheduler))
            if use is None or use.timesteps is not timesteps:
                use = self._uses[id(scheduler)] = _Use(timesteps, me)
            use.shared |= use.thread != me
        return use
