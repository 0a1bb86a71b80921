"""State of one request, held by the server that makes its steps between those of others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor

from lesa.core.checks import shown, whole
from lesa.engine.controller import CacheController
from lesa.engine.fit_to_model import controller_of
from lesa.engine.kept import Kept
from lesa.engine.options import Options
from lesa.errors import LesaError
from lesa.forecasters.target import Quality
from lesa.hooks.attach import attached
from lesa.hooks.batch_rows import rows_of_parts
from lesa.hooks.pipeline import find_denoisers
from lesa.hooks.request import Joint, Request, Source, install, installed, source_of
from lesa.hooks.wrappers import core_of

__all__ = ["Slot"]


class Slot:
    """What lesa keeps of one request on an enabled pipeline: its cached features, its step, its
    budget.

    A server that makes one step of this request, then one of another, installs the slot of each
    before its call; without one, a thread has the only one of its own. It is the same state: what
    is generated in a slot is what is generated alone.

        slot = lesa.Slot(pipe, scheduler=my_scheduler, full_steps=8)
        with slot:  # for every step, or for all
            velocity = pipe.transformer(...)
        slot.clear()  # when the request is over, or has been aborted

    Args:
        pipe: an enabled pipeline, or a denoiser with a lesa cache.
        scheduler: the request's own diffusers scheduler, if it is not the pipeline's.
        num_inference_steps: steps of a loop without a scheduler.
        sigmas: its noise levels in [0, 1], one more than steps; evenly spaced if None.
        full_steps, target_speedup, target_psnr, quality, off: the request's budget, as in
            `lesa.options`; without one that of the block which its first step is in.

    Attributes:
        step_index: the step of the next call, where the server tells it; None leaves that to the
            scheduler, or to the number of calls.

    Raises:
        LesaError: the pipeline is not enabled, a value is invalid, or the budget is above the steps
            of the run.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        scheduler: Any = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        full_steps: int | None = None,
        target_speedup: float | None = None,
        target_psnr: float | None = None,
        quality: Quality | None = None,
        off: bool = False,
    ) -> None:
        budget = Options(full_steps, target_speedup, target_psnr, quality, off)
        own = None if budget == Options() else budget
        source = source_of(scheduler, num_inference_steps, sigmas)
        self._models = find_denoisers(pipe)
        self._controllers = dict.fromkeys(controller_of(model) for model in _enabled(self._models))
        _check_budget(self._controllers, own, source)
        found = [(model, attached(model)) for model in self._models]
        self._clocks = [(model, known.clock) for model, known in found if known is not None]
        clocks = dict.fromkeys(clock for _, clock in self._clocks)
        self._requests = {clock: Request(own, source, shared=True) for clock in clocks}
        self._own = {clock.requests: request for clock, request in self._requests.items()}
        self._before: list[Any] = []

    @property
    def bytes(self) -> int:
        """Bytes of its cached features."""
        return sum(kept.nbytes for kept in self._kept())

    @property
    def step_index(self) -> int | None:
        """See the class."""
        return next(iter(self._requests.values())).index

    @step_index.setter
    def step_index(self, value: int | None) -> None:
        told = None if value is None else whole("step_index", value, 0)
        for request in self._requests.values():
            request.index = told

    def install(
        self,
        pipe: Any = None,
        *,
        num_inference_steps: int | None = None,
        latent: Tensor | None = None,
    ) -> None:
        """Let the calls of this thread or asyncio task belong to this request, until `deactivate`
        or until another slot of the pipeline is installed; as `with slot:` does for a block.

        Raises:
            LesaError: lesa was enabled anew or disabled since, or the arguments are not those that
                the slot is for (see `is_compatible`).
        """
        reason = self._unfit(pipe, num_inference_steps, latent)
        if reason is not None:
            raise LesaError(reason)
        others = installed()
        install({**others, **self._own} if others else self._own)

    def deactivate(self) -> None:
        """Undo `install`; what is kept of the request stays. No effect where it is not
        installed."""
        own = self._own
        left = {key: value for key, value in installed().items() if own.get(key) is not value}
        install(left)

    def is_compatible(
        self,
        pipe: Any = None,
        *,
        num_inference_steps: int | None = None,
        latent: Tensor | None = None,
    ) -> bool:
        """Whether the slot is of this pipeline, and the run that it is in can go on with so many
        steps, and with a latent of this shape, dtype and device. A slot in none can begin any."""
        return self._unfit(pipe, num_inference_steps, latent) is None

    def clear(self) -> None:
        """Forget the request: its features go back to the pool, and the slot may serve another
        one."""
        for clock, request in self._requests.items():
            free = request.turn is not None and request.turn.acquire(blocking=False)
            for trajectory in request.kept.trajectories.values() if request.kept else ():
                trajectory.release(again=free)
            if free and request.turn is not None:
                request.turn.release()
            clock.reset(request)
            request.own = request.index = None
            request.run = lambda: None

    def __enter__(self) -> Slot:
        before = installed()
        self.install()
        self._before.append(before)
        return self

    def __exit__(self, *error: object) -> None:
        install(self._before.pop())

    @staticmethod
    def batch(
        slots: Sequence[Slot], rows: Sequence[int | Sequence[int]] | None = None
    ) -> AbstractContextManager[None]:
        """Let the calls inside belong to several requests, each at its own step, whose rows lie in
        one batch.

        Rows at a skipped step are forecast, the model runs on the others alone. Where the rows of a
        call cannot be told apart, all are computed in full, with a counted reason.

        Args:
            slots: of one pipeline, each with a scheduler, noise levels or a `step_index` of its
                own.
            rows: of each slot, how many neighbouring rows it has, or which ones; one each if None.

        Raises:
            LesaError: slots of different pipelines, a slot twice, or rows that do not make a batch.
        """
        listed = isinstance(slots, (list, tuple))
        if not listed or not all(isinstance(slot, Slot) for slot in slots):
            raise LesaError(f"slots={shown(slots)}: not a list of slots; give [first, second]")
        return _batch(list(slots), rows)

    def _kept(self) -> list[Kept]:
        return [request.kept for request in self._requests.values() if request.kept is not None]

    def _is_stale(self) -> bool:
        """Whether lesa was enabled anew or disabled since the slot was made."""
        for model, clock in self._clocks:
            now = attached(model)
            if now is None or now.clock is not clock:
                return True
        return False

    def _unfit(
        self, pipe: Any = None, steps: int | None = None, latent: Tensor | None = None
    ) -> str | None:
        """Why the slot cannot be used, if so."""
        if pipe is not None and find_denoisers(pipe) != self._models:
            return (
                f"pipe={type(pipe).__name__}: the slot was made for a "
                f"{type(core_of(self._models[0])).__name__} that is none of its denoisers; make "
                "one with lesa.Slot(pipe)"
            )
        if self._is_stale():
            return "slot: lesa was enabled anew or disabled since it was made; make another one"
        if steps is None and latent is None:
            return None
        for request in self._requests.values():
            run = request.run()
            generation = None if run is None else run.generation
            if generation is not None and steps is not None and generation.num_steps != steps:
                return (
                    f"num_inference_steps={steps}: the slot is in a run of {generation.num_steps} "
                    "steps; clear it first, or give every request a slot of its own"
                )
        trajectories = [each for kept in self._kept() for each in kept.trajectories.values()]
        if latent is not None and not all(each.fits(latent) for each in trajectories):
            return (
                f"latent={shown(latent)}: the slot is in a run whose latent has another shape, "
                "dtype or device; clear it first, or give every request a slot of its own"
            )
        return None


def _enabled(models: Sequence[Any]) -> list[Any]:
    """Those of a pipeline's denoisers that lesa accelerates; where it is none, the first one, which
    `controller_of` refuses."""
    return [model for model in models if attached(model)] or list(models[:1])


def _check_budget(
    controllers: dict[CacheController, None], own: Options | None, source: Source | None
) -> None:
    """LesaError where no run, or not the one that the slot is told of, can have this budget."""
    times = getattr(source and source.scheduler, "timesteps", None)
    levels = source.sigmas if source else ()
    steps = len(levels) - 1 if levels else 0 if times is None else len(times)
    for controller in controllers:
        plan = controller.plans.of(own)
        if own is not None and own.full_steps is not None and own.full_steps > steps > 0:
            plan.config.bound_schedule(steps, levels or None)


@contextmanager
def _batch(slots: list[Slot], rows: Sequence[int | Sequence[int]] | None) -> Iterator[None]:
    own = [slot._own for slot in slots]
    if not slots or any(set(each) != set(own[0]) for each in own):
        raise LesaError(f"slots={len(slots)}: not slots of one enabled pipeline; give one or more")
    if len(set(map(id, slots))) < len(slots):
        raise LesaError(f"slots={len(slots)}: one of them twice; give every request its own")
    for slot in slots:
        reason = slot._unfit()
        if reason is not None:
            raise LesaError(reason)
    places = rows_of_parts(len(slots), rows)
    before = installed()
    joint = {key: Joint(tuple(each[key] for each in own), places) for key in own[0]}
    install({**before, **joint})
    try:
        yield
    finally:
        install(before)
