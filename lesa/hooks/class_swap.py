"""Swapping the class of a module instance, and what the swapped forward may see."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

__all__ = [
    "ControlListener",
    "Identity",
    "Listener",
    "Noticed",
    "OnlyLast",
    "Skippable",
    "Signals",
    "Swapped",
    "FeatureHook",
    "is_swapped",
    "restore",
    "swap",
]

# Attributes that a swapped module carries and its copies do not.
_OWN = ("_lesa_denoiser", "_lesa_signals")


class Signals:
    """What the forward may see: plain attributes, since dynamo cannot trace a ContextVar."""

    def __init__(self) -> None:
        self.skip = False
        self.capture = False
        self.feature: torch.Tensor | None = None
        self.captured: torch.Tensor | None = None
        self.mismatch = False
        self.sharded = False
        self.embedded: tuple[Any, ...] | None = None


class Swapped:
    """Base of the mixins: a copy of a swapped module is a plain module of its own class."""

    _lesa_original: type[nn.Module]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        shell: Any = object.__new__(self._lesa_original)
        clone: Any = object.__new__(self._lesa_original)
        shell.__dict__.update((k, v) for k, v in self.__dict__.items() if k not in _OWN)
        memo[id(self)] = clone  # first: diffusers' hook registry refers back to the module
        state = shell.__getstate__() if hasattr(shell, "__getstate__") else shell.__dict__
        clone.__setstate__(copy.deepcopy(state, memo))
        return clone


class Skippable(Swapped):
    """A block container that iterates over nothing on a skipped step."""

    _lesa_signals: Signals

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(()) if self._lesa_signals.skip else super().__iter__()  # type: ignore[misc]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):  # a slice would be built with this class, without signals
            return nn.ModuleList(list(self._modules.values())[index])  # type: ignore[attr-defined]
        return super().__getitem__(index)  # type: ignore[misc]


class OnlyLast(Skippable):
    """A container that holds its last module alone on a skipped step."""

    def __iter__(self) -> Iterator[nn.Module]:
        modules = list(self._modules.values())  # type: ignore[attr-defined]
        return iter(modules[-1:] if self._lesa_signals.skip else modules)

    def __len__(self) -> int:
        return 1 if self._lesa_signals.skip else len(self._modules)  # type: ignore[attr-defined]


class Identity(Swapped):
    """A module that returns its first argument on a skipped step."""

    _lesa_signals: Signals

    def __call__(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if self._lesa_signals.skip:
            return hidden_states
        return super().__call__(hidden_states, *args, **kwargs)  # type: ignore[misc]


class FeatureHook:
    """Pre-hook of the tail: takes the feature at a full step, replaces it at a skipped one.

    The tail's input is the feature alone, or the feature and `joined` more channels, which a
    skipped step computes.
    """

    def __init__(self, signals: Signals, joined: int = 0) -> None:
        self.signals, self.joined = signals, joined

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        signals = self.signals
        if signals.capture:
            # A copy where it is a part: a view would keep all channels alive
            signals.captured = args[0][:, : -self.joined].clone() if self.joined else args[0]
        if not signals.skip or signals.feature is None:
            return None
        if self.joined:
            return (self._join(signals.feature, args[0]), *args[1:]), kwargs
        # Context parallelism may split the input of the first block, which is not run here.
        if signals.feature.shape != args[0].shape and not signals.sharded:
            signals.mismatch = True
            return None
        return (signals.feature.to(args[0]), *args[1:]), kwargs

    def _join(self, feature: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """The tail's input from the feature and what is `given` behind it."""
        behind = given[:, -self.joined :]
        if feature.shape[2:] != behind.shape[2:] or len(feature) != len(behind):
            self.signals.mismatch = True
            return given
        return torch.cat([feature.to(given), behind], dim=1)

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureHook:
        return self


class Listener:
    """Pre-hook of the time embedding: what it is called with."""

    def __init__(self, signals: Signals) -> None:
        self.signals = signals

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.signals.capture or self.signals.skip:
            self.signals.embedded = args

    def __deepcopy__(self, memo: dict[int, Any]) -> Listener:
        return self


class ControlListener:
    """Pre-hook of a ControlNet: the scale that it was last called with in this thread.

    Its residuals are new tensors at every step, also where they are multiplied by 0 from
    `control_guidance_end` on: only the scale tells that the features have changed. `scale` is what
    is known of a call before it listens.
    """

    def __init__(self, module: nn.Module, scale: Any = None) -> None:
        self._module = weakref.ref(module)
        self._local = threading.local()
        self._local.scale = scale
        self._handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def is_on(self, module: nn.Module) -> bool:
        """Whether it listens to this module."""
        return self._module() is module

    @property
    def scale(self) -> Any:
        """A number, or one for each ControlNet; None before the first call."""
        return getattr(self._local, "scale", None)

    def remove(self) -> None:
        """Take the pre-hook away."""
        self._handle.remove()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_on(module):  # not a copy of it
            self._local.scale = kwargs.get("conditioning_scale")

    def __deepcopy__(self, memo: dict[int, Any]) -> ControlListener:
        return self


class Noticed:
    """An attribute of the model through which its adapters or processors are changed.

    Who asks for it is taken to change them: `denoiser.revision` grows before it is handed out.
    """

    def __init__(self, name: str, mixin: type) -> None:
        self._name, self._mixin = name, mixin

    def __get__(self, model: Any, owner: type) -> Any:
        if model is None:
            return getattr(super(self._mixin, owner), self._name)
        model._lesa_denoiser.revision += 1
        return getattr(super(self._mixin, model), self._name)


class _Alias(type):
    """A class that equals the one it stands in for: `from_pipe` asks `type(model) in expected`.
    What is made with it, as by `type(model).from_config`, is of that class."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.__dict__["_lesa_original"](*args, **kwargs)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__dict__.get("_lesa_original")

    def __hash__(cls) -> int:
        return type.__hash__(cls.__dict__.get("_lesa_original", cls))


@cache
def _swapped(mixin: Any, original: Any) -> type:
    """Subclass of `original` that keeps its name, so that saved configurations do not change."""
    names = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "_lesa_original": original,
    }
    plain = type(original) is type
    alias: Any = _Alias if plain else type("_Alias", (_Alias, type(original)), {})
    return alias(original.__name__, (mixin, original), names)


def swap(module: nn.Module, mixin: type, **own: object) -> None:
    """Put `mixin` in front of the module's class and give it the attributes `own`."""
    original: Any = type(module)
    module.__class__ = _swapped(mixin, original)
    module.__dict__.update(own)


def restore(module: nn.Module) -> None:
    """Undo `swap`."""
    module.__class__ = type(module)._lesa_original  # type: ignore[attr-defined]
    for name in _OWN:
        module.__dict__.pop(name, None)


def is_swapped(module: nn.Module) -> bool:
    """Whether the class of `module` is still the one that `swap` gave it."""
    return "_lesa_original" in type(module).__dict__
