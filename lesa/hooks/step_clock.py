"""Which step is this? Read from the cache context, the scheduler in use, or by counting calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from lesa.hooks.branch_context import BranchContext, branch_of
from lesa.hooks.caller import Callers, Run, names
from lesa.hooks.generation import Generation, Generations, Loop
from lesa.hooks.noise_levels import own_noise_levels
from lesa.hooks.pipeline_state import frame_times
from lesa.hooks.position import Position
from lesa.hooks.request import Request, Requests, Source

__all__ = ["Step", "StepClock"]

# More calls than this under one name at one step: the scheduler is not the one of the loop.
_MAX_ORDINAL = 4
_OUTSIDE = "called from outside of the pipeline's loop"
_WINDOW = "the denoiser sees a window of the frames"


@dataclass(slots=True)  # frozen, it would take 1 us of each step, not .3
class Step:
    """One call of the denoiser: step `index` of `num_steps`, in one guidance branch.

    `sigmas` holds `num_steps + 1` noise levels in [0, 1], strictly decreasing, or nothing where the
    scheduler has no such levels; `generation.levels_problem` says why. `fresh` is true on the first
    call of a generation, and where a run goes on after another one on the same model. `problem`
    says why the position cannot be trusted, else None. `parts` is what
    `lesa.hooks.pipeline_state.guidance_parts` tells of the pipeline.
    """

    index: int
    num_steps: int
    sigmas: tuple[float, ...]
    branch: str
    fresh: bool
    problem: str | None = None
    parts: int = 1
    generation: Generation = field(default_factory=Generation)


class StepClock:
    """Tells the step of every call, separately for every request and every run of a loop.

    Whose run it is, is told by the stack: the pipeline whose `__call__` this is, known or not.
    Sources of the step, in this order: `cache_context` fields (`step_index`,
    `num_inference_steps`); the step index of that pipeline's scheduler (looked up at every call) or
    of `scheduler`; while that stands still, the time that the pipeline or the call tells; the
    number of calls since the generation began. A generation begins with a run, when
    `scheduler.timesteps` is a new object, when the step goes backwards or, where steps are counted,
    when the `timestep` of the first one comes again; without a scheduler also after `num_steps`
    steps, or when it turns. A `timestep` is looked at where it lies on the CPU.

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
        self.requests = Requests()
        self._own = Source(scheduler, own_noise_levels(num_steps, sigmas))
        self._callers, self._generations = Callers(), Generations()
        if pipe is not None:
            self.add_pipe(pipe)

    @property
    def pipes(self) -> list[Any]:
        """The pipelines that were named and are still alive."""
        return self._callers.pipes

    def add_pipe(self, pipe: Any) -> None:
        """Let one more pipeline, which shares the model, be a source of steps."""
        self._callers.add_pipe(pipe)

    def caller(self, request: Request) -> tuple[Any, Mapping[str, Any]]:
        """The pipeline whose loop makes the request's current call, and the local variables of that
        call; (None, {}) in a loop of one's own."""
        run = request.run()
        pipe = None if run is None or run.pipe is None else run.pipe()
        return (None, {}) if pipe is None else (pipe, names(run))

    def reset(self, request: Request | None = None) -> None:
        """Forget a request's generation, and all that is kept of it: the next call begins a new
        one. Without `request` of those whose turn it is."""
        if request is None:
            now = self.requests.now()
            for each in (now,) if isinstance(now, Request) else now.requests:
                self.reset(each)
            return
        request.kept = None
        run = request.run()
        if run is not None:
            generation, run.generation = run.generation, None
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
        return BranchContext(self, name, fields, inner)

    def tick(self, kwargs: Mapping[str, Any] | None = None, request: Request | None = None) -> Step:
        """Step of the call that is about to run, whose arguments by name are `kwargs`; to be asked
        exactly once per call.

        Args:
            kwargs: the arguments.
            request: whose call it is; the thread's own if None.

        Raises:
            RunError: a generation begins with a scheduler of no known order.
        """
        _, name, fields, _ = branch_of(self)
        if request is None:
            request = self._alone()
        if request.index is not None:
            fields = {**fields, "step_index": request.index}
        if request.source is None:
            own = self._own
            run, fresh, outside = self._callers.find(request)
        else:
            own, outside = request.source, None
            run, fresh = _own_run(request)
        generation, position = run.generation, run.position
        pipe = self._pipe(run, own) if generation is None else generation.pipe and generation.pipe()
        scheduler = own.scheduler if pipe is None else getattr(pipe, "scheduler", None)
        timesteps = None if scheduler is None else getattr(scheduler, "timesteps", None)
        if outside is not None and generation is not None:
            if not position.at_first(generation, scheduler, name):
                return _outside(generation, position.index)
            run.add_site(outside)
        begins = generation is None or generation.timesteps is not timesteps
        if generation is None or begins:
            generation = self._begin(request, own, run, pipe, kwargs, fields)
            position = run.position
        index = position.find(generation, scheduler, name, fields, kwargs)
        if not begins and (
            index < position.index
            or (position.standing and position.is_over(scheduler, generation, index, kwargs))
        ):
            begins = True
            generation = self._begin(request, own, run, pipe, kwargs, fields)
            position = run.position
            index = position.find(generation, scheduler, name, fields, kwargs)
        ordinal = position.count(index, name)
        if index == generation.num_steps - 1:
            self._generations.end(generation)
        problem = _problem(generation, index, ordinal, pipe, kwargs)
        return _step(generation, index, _branch(name, ordinal), fresh or begins, problem)

    def _alone(self) -> Request:
        """The one request whose call it is; where there are several, who asks has to say which."""
        now = self.requests.now()
        return now if isinstance(now, Request) else now.requests[0]

    def _pipe(self, run: Run, own: Source) -> Any:
        """The pipeline that tells the steps of a run: its own, else the last one that was named."""
        if own.scheduler is not None or own.sigmas:
            return None
        if run.pipe is not None:
            return run.pipe()
        pipes = self.pipes
        return pipes[-1] if pipes else None

    def _begin(
        self,
        request: Request,
        own: Source,
        run: Run,
        pipe: Any,
        kwargs: Mapping[str, Any] | None,
        fields: Mapping[str, Any],
    ) -> Generation:
        """A run's next generation, at its first step."""
        run.generation, run.position = None, Position(kwargs)
        scheduler = own.scheduler if pipe is None else getattr(pipe, "scheduler", None)
        calling = pipe is not None and run.pipe is not None
        loop = Loop(
            pipe,
            scheduler,
            getattr(scheduler, "timesteps", None),
            calling,
            names(run) if calling else {},
            kwargs or {},
            fields.get("num_inference_steps"),
            "step_index" in fields,
            own.sigmas,
            request.token,
        )
        run.generation = self._generations.begin(loop)
        return run.generation


def _own_run(request: Request) -> tuple[Run, bool]:
    """The only run of a request whose steps the caller tells, and whether it is a new one."""
    run = request.own
    if run is not None:
        return run, False
    run = request.own = Run()
    request.run = lambda: run
    return run, True


def _outside(generation: Generation, index: int) -> Step:
    """A call that is no part of the loop, at the loop's step."""
    steps, sigmas = generation.num_steps, generation.sigmas
    return Step(index, steps, sigmas, "outside", False, _OUTSIDE, 1, generation)


def _step(
    generation: Generation, index: int, branch: str, fresh: bool, problem: str | None
) -> Step:
    """A call of the loop."""
    steps, sigmas, parts = generation.num_steps, generation.sigmas, generation.parts
    return Step(index, steps, sigmas, branch, fresh, problem, parts, generation)


def _branch(name: str, ordinal: int) -> str:
    """The branch of a call by its name, and by how many there were of it at this step."""
    return f"{name or 'default'}#{ordinal}" if ordinal else name or "default"


def _problem(
    generation: Generation,
    index: int,
    ordinal: int,
    pipe: Any,
    kwargs: Mapping[str, Any] | None,
) -> str | None:
    if generation.problem is not None:
        return generation.problem
    if generation.use is not None and generation.use.shared is not None:
        return generation.use.shared
    if not 0 <= index < generation.num_steps:
        return "step outside the run"
    if generation.by_frame and _is_window(pipe, kwargs or {}):
        return _WINDOW
    return "scheduler does not advance" if ordinal >= _MAX_ORDINAL else None


def _is_window(pipe: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is given fewer frames than the pipeline has times for."""
    times, given = frame_times(pipe), kwargs.get("timestep")
    return times is None or getattr(given, "shape", ())[-1:] != times.shape
