"""A model under a controller: how one call of it is run, whole or without its blocks."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from lesa.errors import LesaError
from lesa.hooks.class_swap import Signals, Swapped
from lesa.hooks.controls import Controls
from lesa.hooks.model_specs import ModelSpec
from lesa.hooks.outputs import as_batch
from lesa.hooks.request import Request
from lesa.hooks.step_clock import Step, StepClock
from lesa.hooks.wrappers import core_of
from lesa.util.forks import renew_in_children
from lesa.util.warn import warn

__all__ = [
    "Call",
    "Called",
    "Controller",
    "Denoiser",
    "Run",
]


_COMPILED_LATE = (
    "model: torch.compile(model) came after lesa.enable, so the model runs uncompiled; compile "
    "first and enable then, or use model.compile()."
)


class Controller(Protocol):
    """Decides one call of the model: `denoiser.run(...)`, `denoiser.run_tail(...)` or neither.

    An optional method `reset()` is told when a pipeline call has ended.
    """

    def __call__(
        self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> Any: ...


class Call(NamedTuple):
    """One call of the denoiser, at a step that is known, for a request: all rows of the batch, or
    those of its own where it is a `part` of a batch of several requests."""

    denoiser: Denoiser
    step: Step
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    request: Request
    part: bool = False

    def argument(self, name: str) -> Any:
        """Value of an argument of the forward, or None."""
        if not self.args:  # as pipelines call: one call of Python less
            return self.kwargs.get(name)
        return self.denoiser.argument(name, self.args, self.kwargs)


class Run(NamedTuple):
    """What one call of the model gave.

    `feature` is the one before the tail ([B, L, C]; perhaps a view of a larger tensor, so copy it
    to keep it), `embedded` the arguments of the time embedding; None where they were not reached.
    """

    output: Any
    feature: torch.Tensor | None = None
    embedded: tuple[Any, ...] | None = None


class Denoiser:
    """A model under a controller.

    Attributes:
        spec: its row in `lesa.hooks.model_specs`.
        clock: tells the step of each call.
        controls: the pipeline's ControlNets.
        controller: decides each call.
        turn: lock that is held while the model or a watched part of it runs.
        revision: counts what was done to the model's adapters and attention processors.
        original_class: the class of the model before `attach`.
        names: the arguments of the model's forward, in order.
    """

    def __init__(
        self, model: nn.Module, spec: ModelSpec, controller: Controller, clock: StepClock
    ) -> None:
        self.spec = spec
        self.clock = clock
        self.controller = controller
        self.original_class = type(model)
        self._model = weakref.ref(model)
        self.revision = 0
        self._merged_at = -1
        self._merged: Sequence[Any] = ()
        self._call: Callable[..., Any] = type(model).__call__
        self._signals = Signals()
        # One set of signals per model: two threads that share it take turns, also in parts of it.
        self.turn = threading.RLock()
        renew_in_children(self)
        self.names = tuple(inspect.signature(type(core_of(model)).forward).parameters)[1:]
        self._position = {name: position for position, name in enumerate(self.names)}
        self.controls = Controls()

    def renew(self) -> None:
        """In a forked process: the signals and the turn are free."""
        self.turn = threading.RLock()
        self._signals.__init__()  # type: ignore[misc]  # the parts of the model hold this very one

    @property
    def model(self) -> nn.Module:
        """The denoiser; held weakly, the controller never keeps it alive."""
        model = self._model()
        if model is None:
            raise LesaError("model: it has been freed; attach to a live one")
        return model

    @property
    def state(self) -> tuple[Any, ...]:
        """What the model's features depend on besides its arguments; compared by value."""
        if self._merged_at != self.revision:
            self._merged_at, self._merged = self.revision, _merged_adapters(self.model)
        return (self.revision, len(self._merged), *self.controls.state)

    def argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Value of the forward's argument `name` in this call, or None."""
        if name in kwargs or not args:
            return kwargs.get(name)
        position = self._position.get(name, len(args))
        return args[position] if position < len(args) else None

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs} if args else kwargs

    def latent(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The current latent in this call; a list with one for every picture as one batch."""
        latent = self.argument(self.spec.latent, args, kwargs)
        return as_batch(latent) if isinstance(latent, list) else latent

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], tap: bool = False) -> Run:
        """Run the whole model; feature and embedding are noted with `tap` only."""
        signals = self._signals
        with self.turn:
            signals.capture = tap
            try:
                output = self._call(self.model, *args, **kwargs)
                feature, embedded = signals.captured, signals.embedded
            finally:
                signals.capture, signals.captured, signals.embedded = False, None, None
        if feature is not None and self.spec.upcast:
            latent = self.latent(args, kwargs)
            feature = feature.to(latent.dtype)
        return Run(output, feature, embedded)

    def run_tail(self, feature: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
        """Run the model without its blocks, with `feature` in front of the tail.

        The output is None where the shape of `feature` is not the one that the tail gets.
        """
        signals = self._signals
        for name in self.spec.zeroed:
            if kwargs.get(name) is not None:
                kwargs = {**kwargs, name: torch.zeros_like(kwargs[name][:1, :1, :1, :1])}
        with self.turn:
            signals.skip, signals.feature, signals.mismatch = True, feature, False
            signals.sharded = getattr(core_of(self.model), "_parallel_config", None) is not None
            try:
                output = self._call(self.model, *args, **kwargs)
                return Run(None if signals.mismatch else output, feature, signals.embedded)
            finally:
                signals.skip, signals.feature, signals.embedded = False, None, None

    def reset(self) -> None:
        """Tell the clock and the controller that the generation whose turn it is is over."""
        self.clock.reset()
        reset = getattr(self.controller, "reset", None)
        if reset is not None:
            reset()


class Called(Swapped):
    """The model: every call goes to the controller."""

    _lesa_denoiser: Denoiser

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        denoiser = self.__dict__.get("_lesa_denoiser")
        if denoiser is None:  # detached, but an earlier torch.compile holds this very method
            return type(self).__call__(self, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            return _call_uncompiled(denoiser, args, kwargs)
        return denoiser.controller(denoiser, args, kwargs)


@torch.compiler.disable(reason=_COMPILED_LATE)
def _call_uncompiled(denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call out of a `torch.compile` that came later: else dynamo traces the controller."""
    warn(_COMPILED_LATE)
    return denoiser.controller(denoiser, args, kwargs)


def _merged_adapters(model: nn.Module) -> Sequence[Any]:
    """PEFT's own list on the first adapted layer: pipelines unfuse without asking the model."""
    found = (vars(module).get("merged_adapters") for module in model.modules())
    return next((merged for merged in found if merged is not None), ())
