"""Attach a controller to a denoiser: it decides each call and may skip the blocks.

The model instance gets a subclass of its own class, the block containers a subclass of theirs that
can iterate over nothing, the first tail module and the time embedding one pre-hook each. `detach`
undoes all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NoReturn

from torch import nn

from lesa.errors import LesaError
from lesa.hooks.class_swap import (
    FeatureHook,
    Listener,
    Noticed,
    Signals,
    is_swapped,
    restore,
    swap,
)
from lesa.hooks.denoiser import Called, Controller, Denoiser
from lesa.hooks.model_specs import ModelSpec, model_spec
from lesa.hooks.step_clock import StepClock
from lesa.hooks.wrappers import core_of

__all__ = ["attach", "attached", "controlled", "detach", "refuse_other_cache"]


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
        LesaError: unknown class, a row that names other parts than the model has, or another cache
            on the model; nothing has been changed then.
    """
    core = core_of(model)
    spec = model_spec(core)
    if attached(model) is not None:
        raise LesaError(f"model: {type(core).__name__} has lesa enabled already; disable it first")
    refuse_other_cache(model)
    spec.check(core)
    denoiser = Denoiser(model, spec, controller, clock or StepClock(pipe))
    for known in denoiser.clock.pipes:
        denoiser.controls.watch(known)
    for mixin, parts in spec.swapped(core).items():
        for part in parts:
            swap(part, mixin, _lesa_signals=denoiser._signals)
    hook = _feature_hook(core, spec, denoiser._signals) if spec.tail else None
    if hook is not None:
        spec.module(core, spec.tail).register_forward_pre_hook(hook, with_kwargs=True)
    if spec.embedding:
        embedding = core.get_submodule(spec.embedding)
        embedding.register_forward_pre_hook(Listener(denoiser._signals))
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
            "undo that first, then disable"
        )
    core = core_of(model)
    for parts in denoiser.spec.swapped(core).values():
        for part in parts:
            restore(part)
    denoiser.controls.unwatch()
    _clean(core, denoiser.spec)
    restore(model)


@contextmanager
def controlled(models: Iterable[nn.Module], controller: Controller, pipe: Any) -> Iterator[None]:
    """`attach` one controller and one clock to the denoisers of a pipeline for a while."""
    clock = StepClock(pipe)
    with ExitStack() as stack:
        for model in models:
            attach(model, controller, clock=clock)
            stack.callback(detach, model)
        yield


def attached(model: nn.Module) -> Denoiser | None:
    """The denoiser that `attach` made for this model, or for the one that it is compiled from."""
    own = model.__dict__.get("_lesa_denoiser")
    return own or core_of(model).__dict__.get("_lesa_denoiser")


class _Controlled(Called):
    """The model, with the cache API of diffusers' models."""

    is_cache_enabled = True

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
            "model: it is accelerated by lesa and cannot be pickled; call lesa.disable first"
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


def _feature_hook(core: nn.Module, spec: ModelSpec, signals: Signals) -> FeatureHook | None:
    """The pre-hook of the tail; None where the tail does not get what the row says."""
    if not spec.joined:
        return FeatureHook(signals)
    joined: Any = spec.module(core, spec.joined)
    *_, before, tail = spec.module(core, spec.tail.rpartition(".")[0]).children()
    fits = tail.in_channels == before.out_channels + joined.out_channels
    # else the blocks join in another place
    return FeatureHook(signals, joined.out_channels) if fits else None


def _clean(core: nn.Module, spec: ModelSpec) -> None:
    """Remove the pre-hooks and the configuration that `attach` left on the model or its copy."""
    core.__dict__.pop("_cache_config", None)
    for name in filter(None, (spec.tail, spec.embedding)):
        module = spec.module(core, name)
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, (FeatureHook, Listener)):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def refuse_other_cache(model: nn.Module) -> None:
    """LesaError if a cache of diffusers is on this model."""
    core = core_of(model)
    config = None if attached(model) else getattr(core, "_cache_config", None)
    if config is not None:
        raise LesaError(
            f"model: {type(config).__name__} is enabled on it; call model.disable_cache() first"
        )
    for module in core.modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        for name, hook in hooks.items():
            if getattr(hook, "_is_stateful", False):
                raise LesaError(f"model: the cache hook {name!r} is on it; remove it first")
