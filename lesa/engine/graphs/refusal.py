"""Whether a skipped step may be recorded as a CUDA graph now."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lesa.engine.graphs.capture import CudaRecorder, Recorder
from lesa.hooks.class_swap import FeatureHook, Listener

__all__ = ["refusal"]

_MOVING = ("group_offloading", "lazy_prefetch_group_offloading", "layerwise_casting")


def refusal(
    modules: Iterable[nn.Module],
    device: torch.device,
    *,
    recorder: Recorder | None = None,
    model: nn.Module | None = None,
) -> str | None:
    """Why a body that calls these modules is not to be recorded on `device` now, or None.

    `model` is the whole denoiser, on which offloading may hang its hook.
    """
    if reason := (recorder or CudaRecorder()).refusal(device):
        return reason
    if os.environ.get("LESA_DISABLE_GRAPH", "0") not in ("", "0"):
        return "LESA_DISABLE_GRAPH is set"
    if torch.is_grad_enabled():
        return "grad is enabled"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    called = [each for module in modules for each in module.modules()]
    for module in called if model is None else [*called, model]:
        if hook := _moving_hook(module):
            return f"{hook} is on {type(module).__name__}"
    for module in called:
        name = type(module).__name__
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if not all(
            isinstance(hook, (FeatureHook, Listener)) for hook in hooks
        ):  # a replay would not call it
            return f"a forward hook is on {name}"
        for tensor in (*module.parameters(False), *module.buffers(False)):
            if tensor.device != device:
                return f"weights of {name} are on {tensor.device}, the feature on {device}"
    return None


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
