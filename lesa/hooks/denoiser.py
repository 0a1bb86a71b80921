"""A model under a controller: how one call of it is run, whole or without its blocks."""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from lesa.errors import LesaError
from lesa.hooks.class_swap import ControlListener, Signals, Swapped
from lesa.hooks.model_specs import ModelSpec
from lesa.hooks.pipeline_state import control_parts, control_scale, controls_of
from lesa.hooks.request import Request
from lesa.hooks.step_clock import Step, StepClock
from lesa.util.forks import renew_in_children

__all__ = [
    "Call",
    "Called",
    "Controller",
    "Denoiser",
    "Run",
    "as_batch",
    "core_of",
    "kind_of",
    "make_output",
    "read_sample",
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
        self._controls: list[ControlListener] = []
        self._control_parts: tuple[Any, dict[str, int]] = lambda: None, {}

    def renew(self) -> None:
        """In a forked process: the signals and the turn are free."""
        self.turn = threading.RLock()
        self._signals.__init__()  # type: ignore[misc]  # the parts of the model hold this very one

    @property
    def model(self) -> nn.Module:
        """The denoiser; held weakly, the controller never keeps it alive."""
        model = self._model()
        if model is None:
            raise LesaError("model: it has been freed; attach to a live one.")
        return model

    @property
    def state(self) -> tuple[Any, ...]:
        """What the model's features depend on besides its arguments; compared by value."""
        if self._merged_at != self.revision:
            self._merged_at, self._merged = self.revision, _merged_adapters(self.model)
        scales = [control.scale for control in self._controls] if self._controls else ()
        replaced = bool(self._controls) and self._is_control_replaced()
        return (self.revision, len(self._merged), replaced, *[s for s in scales if s is not None])

    def _is_control_replaced(self) -> bool:
        """Whether the pipeline that was watched last holds other ControlNets than then."""
        known, parts = self._control_parts
        pipe = known()
        return pipe is not None and any(
            id(getattr(pipe, name, None)) != part for name, part in parts.items()
        )

    def watch(self, pipe: Any, names: Mapping[str, Any] | None = None) -> None:
        """Take note of the pipeline's ControlNets and their scales, if it has any.

        `names` are the local variables of its call where that is at work: they tell the scale of a
        step at which the ControlNet has run already.
        """
        parts = control_parts(pipe)
        if parts:
            self._control_parts = (
                weakref.ref(pipe),
                {name: id(part) for name, part in parts.items()},
            )
        for control in controls_of(pipe):
            if not any(known.is_on(control) for known in self._controls):
                self._controls.append(ControlListener(control, control_scale(names or {})))

    def unwatch(self) -> None:
        """Undo `watch`."""
        for control in self._controls:
            control.remove()
        self._controls.clear()

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
    warnings.warn(_COMPILED_LATE, stacklevel=2)
    return denoiser.controller(denoiser, args, kwargs)


# What wraps a model, by class, and where it keeps it.
_WRAPPERS = {
    "OptimizedModule": ("_orig_mod",),
    "DataParallel": ("module",),
    "DistributedDataParallel": ("module",),
    "FullyShardedDataParallel": ("_fsdp_wrapped_module",),
    "PeftModel": ("base_model", "model"),
}


def core_of(model: nn.Module) -> nn.Module:
    """The denoiser inside `torch.compile(denoiser)`, DataParallel, DDP, FSDP or a PeftModel, or the
    model itself."""
    kind: Any = type(model)
    path, core = _path_inside(kind), model
    for name in path:
        core = core.__dict__["_modules"][name]
    return core_of(core) if path else model


@cache
def _path_inside(kind: type) -> tuple[str, ...]:
    """Where a wrapper of this class keeps the model; empty for what is not a wrapper."""
    found = (_WRAPPERS[base.__name__] for base in kind.__mro__ if base.__name__ in _WRAPPERS)
    return next(found, ())


def read_sample(output: Any) -> torch.Tensor | None:
    """The one tensor of a model output (tensor, 1-tuple or `.sample`), or None if it has others. A
    list with a tensor of the same shape for every picture is one batch."""
    return as_batch(_inside(output))


def _inside(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, (tuple, dict)) and len(output) != 1:
        return None
    return output[0] if isinstance(output, tuple) else getattr(output, "sample", None)


def as_batch(value: Any) -> torch.Tensor | None:
    """A tensor as it is, a list of tensors of one shape and dtype as one tensor, else None."""
    if isinstance(value, torch.Tensor):
        return value
    if not isinstance(value, list) or not all(isinstance(part, torch.Tensor) for part in value):
        return None
    alike = len({(part.shape, part.dtype, part.device) for part in value}) == 1
    return torch.stack(value) if alike else None


class ListOf(NamedTuple):
    """The kind of an output of class `kind` that holds a list with a tensor for every picture."""

    kind: Any


def kind_of(output: Any) -> type | ListOf:
    """What `make_output` has to know of an output."""
    return ListOf(type(output)) if isinstance(_inside(output), list) else type(output)


def make_output(kind: Any, sample: torch.Tensor) -> Any:
    """An output of a kind (see `kind_of`) around `sample`: the inverse of `read_sample`."""
    if isinstance(kind, ListOf):
        parts: Any = list(sample.unbind(0))
        return (parts,) if issubclass(kind.kind, tuple) else kind.kind(sample=parts)
    if issubclass(kind, torch.Tensor):
        return sample
    return (sample,) if issubclass(kind, tuple) else kind(sample=sample)


def _merged_adapters(model: nn.Module) -> Sequence[Any]:
    """PEFT's own list on the first adapted layer: pipelines unfuse without asking the model."""
    found = (vars(module).get("merged_adapters") for module in model.modules())
    return next((merged for merged in found if merged is not None), ())
