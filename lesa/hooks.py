"""Attach a controller to a denoiser: it decides each call and may skip the blocks.

The model instance gets a subclass of its own class, the block containers a subclass of theirs that
can iterate over nothing, the first tail module and the time embedding one pre-hook each. `detach`
undoes all of it.
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import nn

from lesa.clock import StepClock
from lesa.errors import LesaError
from lesa.models import ModelSpec, model_spec
from lesa.swap import (
    ControlListener,
    Identity,
    Listener,
    Noticed,
    Skippable,
    Slot,
    Swapped,
    Tap,
    is_swapped,
    restore,
    swap,
)

__all__ = [
    "Controller",
    "Denoiser",
    "Run",
    "attach",
    "attached",
    "core_of",
    "detach",
    "make_output",
    "read_sample",
    "refuse_other_cache",
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
        spec: its row in `lesa.models`.
        clock: tells the step of each call.
        controller: decides each call.
        turn: lock that is held while the model or a watched part of it runs.
        revision: counts what was done to the model's adapters and attention processors.
        original_class: the class of the model before `attach`.
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
        self._slot = Slot()
        # The slot is one per model: two threads that share it take turns, also in parts of it.
        self.turn = threading.RLock()
        names = list(inspect.signature(type(core_of(model)).forward).parameters)[1:]
        self._position = {name: position for position, name in enumerate(names)}
        self._controls: list[ControlListener] = []

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
        return (self.revision, len(self._merged), *[control.scale for control in self._controls])

    def watch(self, pipe: Any) -> None:
        """Take note of the scale of the pipeline's ControlNet, if it has one."""
        control = getattr(pipe, "controlnet", None)
        if isinstance(control, nn.Module) and not any(c.is_on(control) for c in self._controls):
            self._controls.append(ControlListener(control))

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

    def latent(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The current latent in this call."""
        return self.argument(self.spec.latent, args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], tap: bool = False) -> Run:
        """Run the whole model; feature and embedding are noted with `tap` only."""
        slot = self._slot
        with self.turn:
            slot.capture = tap
            try:
                output = self._call(self.model, *args, **kwargs)
                feature, embedded = slot.captured, slot.embedded
            finally:
                slot.capture, slot.captured, slot.embedded = False, None, None
        if feature is not None and self.spec.upcast:
            latent = self.latent(args, kwargs)
            feature = feature.to(latent.dtype)
        return Run(output, feature, embedded)

    def run_tail(self, feature: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
        """Run the model without its blocks, with `feature` in front of the tail.

        The output is None where the shape of `feature` is not the one that the tail gets.
        """
        slot = self._slot
        if self.spec.dropped:
            kwargs = {name: kwargs[name] for name in kwargs if name not in self.spec.dropped}
        with self.turn:
            slot.skip, slot.feature, slot.mismatch = True, feature, False
            slot.sharded = getattr(core_of(self.model), "_parallel_config", None) is not None
            try:
                output = self._call(self.model, *args, **kwargs)
                return Run(None if slot.mismatch else output, feature, slot.embedded)
            finally:
                slot.skip, slot.feature, slot.embedded = False, None, None

    def reset(self) -> None:
        """Tell the clock and the controller that this thread's generation is over."""
        self.clock.reset()
        reset = getattr(self.controller, "reset", None)
        if reset is not None:
            reset()


def attach(
    model: nn.Module,
    controller: Controller,
    pipe: Any = None,
    *,
    clock: StepClock | None = None,
    config: object = None,
) -> Denoiser:
    """Let `controller(denoiser, args, kwargs) -> output` decide every call of `model`.

    Args:
        model: a denoiser of a known class, or `torch.compile(denoiser)`.
        controller: see `Controller`.
        pipe: the pipeline whose loop calls the model.
        clock: instead of a `StepClock(pipe)`, for one's own loop.
        config: what `model._cache_config` shows; the controller if None.

    Raises:
        LesaError: unknown class, or another cache on the model.
    """
    core = core_of(model)
    spec = model_spec(core)
    if attached(model) is not None:
        raise LesaError(f"model: {type(core).__name__} has lesa enabled already; disable it first.")
    refuse_other_cache(model)
    denoiser = Denoiser(model, spec, controller, clock or StepClock(pipe))
    for known in denoiser.clock.pipes:
        denoiser.watch(known)
    for name in spec.blocks:
        swap(core.get_submodule(name), Skippable, _lesa_slot=denoiser._slot)
    for name in spec.identities:
        swap(core.get_submodule(name), Identity, _lesa_slot=denoiser._slot)
    tail = core.get_submodule(spec.tail)
    tail.register_forward_pre_hook(Tap(denoiser._slot), with_kwargs=True)
    if spec.embedding:
        embedding = core.get_submodule(spec.embedding)
        embedding.register_forward_pre_hook(Listener(denoiser._slot))
    core.__dict__["_cache_config"] = controller if config is None else config
    swap(model, _Controlled, _lesa_denoiser=denoiser)
    return denoiser


def detach(model: nn.Module) -> None:
    """Give the model back its class, its containers and its tail; no effect if not attached.

    Raises:
        LesaError: something else has swapped the class of the model since `attach`.
    """
    denoiser = attached(model)
    if denoiser is None:
        return
    model = denoiser.model
    if not is_swapped(model):
        raise LesaError(
            f"model: its class became {type(model).__name__} after lesa was enabled; "
            "undo that first, then disable."
        )
    core = core_of(model)
    for name in (*denoiser.spec.blocks, *denoiser.spec.identities):
        restore(core.get_submodule(name))
    denoiser.unwatch()
    _clean(core, denoiser.spec)
    restore(model)


def attached(model: nn.Module) -> Denoiser | None:
    """The denoiser that `attach` made for this model, or for the one that it is compiled from."""
    own = model.__dict__.get("_lesa_denoiser")
    return own or core_of(model).__dict__.get("_lesa_denoiser")


def read_sample(output: Any) -> torch.Tensor | None:
    """The one tensor of a model output (tensor, 1-tuple or `.sample`), or None if it has others."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, (tuple, dict)) and len(output) != 1:
        return None
    sample = output[0] if isinstance(output, tuple) else getattr(output, "sample", None)
    return sample if isinstance(sample, torch.Tensor) else None


def make_output(kind: Any, sample: torch.Tensor) -> Any:
    """An output of class `kind` around `sample`: the inverse of `read_sample`."""
    if issubclass(kind, torch.Tensor):
        return sample
    return (sample,) if issubclass(kind, tuple) else kind(sample=sample)


class _Controlled(Swapped):
    """The model: every call goes to the controller."""

    is_cache_enabled = True
    _lesa_denoiser: Denoiser

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        denoiser = self.__dict__.get("_lesa_denoiser")
        if denoiser is None:  # detached, but an earlier torch.compile holds this very method
            return type(self).__call__(self, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            return _call_uncompiled(denoiser, args, kwargs)
        return denoiser.controller(denoiser, args, kwargs)

    def cache_context(self, name: str, **fields: Any) -> AbstractContextManager[None]:
        """As in diffusers; also tells the branch and the step to the clock."""
        inherited = self._inherited("cache_context")
        inner = None if inherited is None else inherited(name, **fields)
        return self._lesa_denoiser.clock.context(name, fields, inner)

    def disable_cache(self) -> None:
        """As in diffusers: remove the cache from this model."""
        detach(self)  # type: ignore[arg-type]

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """Called by pipelines at the end of a call."""
        self._lesa_denoiser.reset()
        inherited = self._inherited("_reset_stateful_cache")
        if inherited is not None:
            inherited(recurse)

    def _inherited(self, name: str) -> Any:
        core: Any = core_of(self)  # type: ignore[arg-type]
        return getattr(super() if core is self else core, name, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        config: Any = core_of(self).__dict__["_cache_config"]  # type: ignore[arg-type]
        memo[id(config)] = None  # may hold locks and forecasters: the copy gets none
        clone = super().__deepcopy__(memo)
        del memo[id(config)]
        _clean(core_of(clone), self._lesa_denoiser.spec)
        return clone

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise LesaError(
            "model: it is accelerated by lesa and cannot be pickled; call lesa.disable first."
        )


for _name in (
    "add_adapter",
    "attn_processors",  # IP-Adapter scales are written to them
    "delete_adapters",
    "disable_adapters",
    "disable_lora",
    "enable_adapters",
    "enable_lora",
    "fuse_lora",
    "load_lora_adapter",
    "load_state_dict",
    "set_adapter",
    "set_adapters",
    "set_attn_processor",
    "unfuse_lora",
    "unload_lora",
):
    setattr(_Controlled, _name, Noticed(_name, _Controlled))


@torch.compiler.disable(reason=_COMPILED_LATE)
def _call_uncompiled(denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call out of a `torch.compile` that came later: else dynamo traces the controller."""
    warnings.warn(_COMPILED_LATE, stacklevel=2)
    return denoiser.controller(denoiser, args, kwargs)


def _clean(core: nn.Module, spec: ModelSpec) -> None:
    """Remove the pre-hooks and the configuration that `attach` left on the model or its copy."""
    core.__dict__.pop("_cache_config", None)
    for name in (spec.tail, spec.embedding):
        module = core.get_submodule(name)  # of no name: the model itself, which has none of them
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, (Tap, Listener)):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def _merged_adapters(model: nn.Module) -> Sequence[Any]:
    """PEFT's own list on the first adapted layer: pipelines unfuse without asking the model."""
    found = (vars(module).get("merged_adapters") for module in model.modules())
    return next((merged for merged in found if merged is not None), ())


def core_of(model: nn.Module) -> nn.Module:
    """The denoiser inside `torch.compile(denoiser)`, or the model itself."""
    core = model.__dict__.get("_modules", {}).get("_orig_mod")
    return model if core is None else core


def refuse_other_cache(model: nn.Module) -> None:
    """LesaError if a cache of diffusers is on this model."""
    core = core_of(model)
    config = None if attached(model) else getattr(core, "_cache_config", None)
    if config is not None:
        raise LesaError(
            f"model: {type(config).__name__} is enabled on it; call model.disable_cache() first."
        )
    for module in core.modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        for name, hook in hooks.items():
            if getattr(hook, "_is_stateful", False):
                raise LesaError(f"model: the cache hook {name!r} is on it; remove it first.")
