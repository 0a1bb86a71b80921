"""Whether a skipped step may be recorded as a CUDA graph now."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from lesa.engine.graphs.capture import CudaRecorder, Recorder
from lesa.hooks.class_swap import FeatureHook, Listener

__all__ = ["refusal"]

_MOVING = ("group_offloading", "lazy_prefetch_group_offloading", "layerwise_casting")


class _Candidate(NamedTuple):
    """What is to be recorded: the modules that it calls, on which device, of which model."""

    called: list[nn.Module]
    device: torch.device
    recorder: Recorder
    model: nn.Module | None


def refusal(
    modules: Iterable[nn.Module],
    device: torch.device,
    *,
    recorder: Recorder | None = None,
    model: nn.Module | None = None,
) -> str | None:
    """Why a body that calls these modules is not to be recorded on `device` now, or None.

    Args:
        modules: those that it calls.
        device: where the feature lies.
        recorder: what records; CUDA's if None.
        model: the whole denoiser, on which offloading may hang its hook.
    """
    called = [each for module in modules for each in module.modules()]
    candidate = _Candidate(called, device, recorder or CudaRecorder(), model)
    return next((reason for check in _CHECKS if (reason := check(candidate))), None)


def _of_device(candidate: _Candidate) -> str | None:
    return candidate.recorder.refusal(candidate.device)


def _of_user(candidate: _Candidate) -> str | None:
    unset = os.environ.get("LESA_DISABLE_GRAPH", "0") in ("", "0")
    return None if unset else "LESA_DISABLE_GRAPH is set"


def _of_mode(candidate: _Candidate) -> str | None:
    if torch.is_grad_enabled():
        return "grad is enabled"
    return "autocast is on" if torch.is_autocast_enabled(candidate.device.type) else None


def _of_moving_weights(candidate: _Candidate) -> str | None:
    model = candidate.model
    for module in candidate.called if model is None else [*candidate.called, model]:
        if hook := _moving_hook(module):
            return f"{hook} is on {type(module).__name__}"
    return None


def _of_hooks_and_places(candidate: _Candidate) -> str | None:
    device = candidate.device
    for module in candidate.called:
        name = type(module).__name__
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        # a replay would not call it
        if not all(isinstance(hook, (FeatureHook, Listener)) for hook in hooks):
            return f"a forward hook is on {name}"
        for tensor in (*module.parameters(False), *module.buffers(False)):
            if tensor.device != device:
                return f"weights of {name} are on {tensor.device}, the feature on {device}"
    return None


# The first reason counts, so what holds for all modules comes first.
_CHECKS: tuple[Callable[[_Candidate], str | None], ...] = (
    _of_device,
    _of_user,
    _of_mode,
    _of_moving_weights,
    _of_hooks_and_places,
)


def _moving_hook(module: nn.Module) -> str | None:
    """The hook of accelerate or diffusers that moves or casts this module's weights, if any."""
    for hook in _unpacked(getattr(module, "_hf_hook", None)):
        # AlignDevicesHook, CpuOffload and LayerwiseCastingHook, in this order
        moves = getattr(hook, "offload", False) or hasattr(hook, "prev_module_hook")
        if moves or hasattr(hook, "storage_dtype"):
            return f"accelerate's {type(hook).__name__}"
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return next((f"diffusers' {name}" for name in _MOVING if name in hooks), None)


def _unpacked(hook: Any) -> Iterator[Any]:
    yield hook
    for inner in getattr(hook, "hooks", ()):
        yield from _unpacked(inner)
