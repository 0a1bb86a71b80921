"""A plain copy of a module, whatever others have put on it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ordinary", "plain_copy"]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_PATCHED = ("forward", "_hf_hook", "_old_forward", "_diffusers_hook")  # by accelerate, diffusers


def plain_copy(module: nn.Module) -> nn.Module:
    """A plain copy of a module: without hooks of others, offloading's among them, and with weights
    that know gradients, whatever mode they were loaded in. Those that are elsewhere become memory
    on the host."""
    made: nn.Module = object.__new__(type(module))
    made.__dict__.update({k: v for k, v in module.__dict__.items() if k not in _PATCHED})
    for name in _HOOKS:
        made.__dict__[name] = OrderedDict()
    made._parameters = {
        name: part if part is None else nn.Parameter(ordinary(_here(part.detach().clone())))
        for name, part in module._parameters.items()
    }
    made._buffers = {
        name: part if part is None else ordinary(_here(part.clone()))
        for name, part in module._buffers.items()
    }
    made._modules = {
        name: part if part is None else plain_copy(part) for name, part in module._modules.items()
    }
    return made


def _here(part: Tensor) -> Tensor:
    return torch.empty_like(part, device="cpu") if part.is_meta else part


def ordinary(value: Any) -> Any:
    """A tensor of inference mode as an ordinary one; everything else as it is."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
