"""Whose loop calls the denoiser? Told at every call, by the frame in which the loop runs."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType
from typing import Any, NamedTuple

from lesa.hooks.generation import Generation
from lesa.hooks.pipeline_state import is_pipe
from lesa.hooks.position import Position
from lesa.hooks.request import Request

__all__ = ["Callers", "Run", "Site", "names"]

_NEAR = 8  # frames within which a pipeline's method of any name is taken for its loop
_MODEL = "lesa.hooks.denoiser"
_PIPELINES = {"DiffusionPipeline", "ModularPipeline"}
# Frames of their own that are a part of the function around them (comprehensions before 3.12).
_INNER = {"<genexpr>", "<listcomp>", "<setcomp>", "<dictcomp>"}
_LIBRARIES = {"accelerate", "diffusers", "peft", "torch"}


class Run:
    """One run of a denoising loop: a pipeline's call, or a loop of one's own.

    The run of a pipeline's call, or of a generator, is kept among the local variables there: it is
    gone when the call ends, in whatever way, and no other call can be mistaken for it.

    Attributes:
        pipe: the pipeline, held weakly; None in a loop of one's own.
        frame: `id` of the frame where it is kept; 0 where it is not: in a plain loop of one's own,
            and in what may make one step only, as a pipeline's method of another name.
        up: how many frames above `Callers.find` the function stands that calls the denoiser.
        sites: of each such function, by the `id` of its code, how many frames above `Callers.find`
            the loop's own frame stands; below 0 the pipeline's method, 0 in a loop of one's own.
        generation: what it generates; None before its first step.
        position: the step that it is at.
    """

    __slots__ = ("__weakref__", "_codes", "frame", "generation", "pipe", "position", "sites", "up")

    def __init__(self, pipe: Any = None, frame: int = 0) -> None:
        self.pipe = None if pipe is None else weakref.ref(pipe)
        self.frame, self.up = frame, 0
        self.sites: dict[int, int] = {}
        self._codes: list[CodeType] = []  # no other code gets the `id` of one that is kept
        self.generation: Generation | None = None
        self.position = Position()

    def add_site(self, site: Site) -> None:
        """Take a function that calls the denoiser for a part of this loop."""
        self._codes.append(site.code)
        self.up, self.sites[id(site.code)] = site.up, site.depth


class Site(NamedTuple):
    """Where a call comes from: the caller's code and place, the loop's place as in `Run.sites`."""

    code: CodeType
    up: int
    depth: int


class Callers:
    """Finds the run that a call of the denoiser belongs to, separately for every request."""

    def __init__(self) -> None:
        self._pipes: list[weakref.ref[Any]] = []

    @property
    def pipes(self) -> list[Any]:
        """The pipelines that were named and are still alive."""
        return [pipe for known in self._pipes if (pipe := known()) is not None]

    def add_pipe(self, pipe: Any) -> None:
        """Name a pipeline that uses the denoiser."""
        if all(known is not pipe for known in self.pipes):
            self._pipes.append(weakref.ref(pipe))

    def find(self, request: Request) -> tuple[Run, bool, Site | None]:
        """The request's run of the call that is about to be made; asked by `StepClock.tick` alone,
        since it counts frames.

        Returns:
            The run; whether it is another one than at the last call; where the call comes from if
            that is no known part of the loop (a callback's, perhaps), else None.
        """
        run = request.run()
        if run is not None:
            try:
                depth = run.sites.get(id(sys._getframe(run.up).f_code))
                if depth is None:
                    pass
                elif depth > 0:
                    if id(sys._getframe(depth)) == run.frame:
                        return run, False, None
                elif depth == 0 or _self(sys._getframe(-depth)) is run.pipe():
                    return run, False, None
            except ValueError:  # the stack is not that deep
                pass
        return self._search(request, run)

    def _search(self, request: Request, last: Run | None) -> tuple[Run, bool, Site | None]:
        """`find` where a look at known places does not do: up the whole stack."""
        stack = list(_above(sys._getframe(1)))
        up = _caller(stack)
        pipe, depth = self._loop(stack[up:])
        site = Site(stack[up][1].f_code, up, depth)
        if depth > 0:
            frame = stack[depth][1]
            run = frame.f_locals.get(request.name) or Run(pipe, id(frame))
            frame.f_locals[request.name] = run
            between = (each for _, each in stack[up:depth])
            if run.generation is not None and not all(_is_part(each, pipe) for each in between):
                return run, run is not last, site
        else:
            own = request.own
            known = None if own is None or own.pipe is None else own.pipe()
            run = request.own = Run(pipe) if own is None or known is not pipe else own
        run.add_site(site)
        request.run = weakref.ref(run)
        return run, run is not last, None

    def _loop(self, stack: list[tuple[int, FrameType]]) -> tuple[Any, int]:
        """The nearest pipeline among the callers, if any, and the place of the loop's frame as in
        `Run.sites`."""
        pipe, method, generator = None, 0, 0
        for place, frame in stack:
            called = frame.f_code.co_name == "__call__"
            near = place <= stack[0][0] + _NEAR
            if near and not generator and _is_generator(frame.f_code):
                generator = place
            owner = _self(frame) if called or near else None
            if owner is None or (pipe is not None and owner is not pipe):
                continue
            own = self._is_own(owner)
            if own or (called and is_pipe(owner)):
                pipe, method = owner, method or place
                if called and own:
                    return pipe, place
        return pipe, generator or -method

    def _is_own(self, owner: Any) -> bool:
        """Whether a call of this object is a whole run: a pipeline of diffusers, or a named one.
        Others that have a scheduler may make one step in a call."""
        if any(owner is pipe for pipe in self.pipes):
            return True
        kinds = {kind.__name__ for kind in type(owner).__mro__}
        return bool(kinds & _PIPELINES) and is_pipe(owner)


def names(run: Run | None) -> Mapping[str, Any]:
    """The local variables of the pipeline's call that a run is; empty in a loop of one's own."""
    for _, frame in _above(sys._getframe()):
        if run is not None and id(frame) == run.frame:
            return frame.f_locals
    return {}


def _above(frame: FrameType | None) -> Iterator[tuple[int, FrameType]]:
    """The frames from this one on, outwards, by their distance."""
    place = 0
    while frame is not None:
        yield place, frame
        frame, place = frame.f_back, place + 1


def _caller(stack: list[tuple[int, FrameType]]) -> int:
    """Where in the stack the function stands that calls the model: above the model's own call, or
    above `tick` where that is asked directly."""
    models = [n for n, frame in stack[2:_NEAR] if frame.f_globals.get("__name__") == _MODEL]
    return min(models[-1] + 1 if models else 2, len(stack) - 1)


def _self(frame: FrameType) -> Any:
    """What a method's frame belongs to, else None. The names of other frames are not looked at:
    before Python 3.13 a look keeps their values alive."""
    names = frame.f_code.co_varnames
    return frame.f_locals.get("self") if names[:1] == ("self",) else None


def _is_generator(code: CodeType) -> bool:
    """Whether a function yields, as one that holds a loop does."""
    return bool(code.co_flags & inspect.CO_GENERATOR) and code.co_name not in _INNER


def _is_part(frame: FrameType, pipe: Any) -> bool:
    """Whether a frame between a pipeline's call and the denoiser is a part of its loop."""
    library = str(frame.f_globals.get("__name__")).partition(".")[0]
    inner = frame.f_code.co_name in _INNER
    return inner or library in _LIBRARIES or _self(frame) is pipe
