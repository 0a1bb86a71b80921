"""A plain copy of a module, whatever others have put on it; weights that stay as they are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["ordinary", "plain_copy", "weights_fixed"]

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
    """A plain copy of a module: uncompiled, without hooks of others, offloading's among them, and
    with weights that know gradients, whatever mode they were loaded in. Those that are elsewhere
    become memory on the host."""
    made: nn.Module = object.__new__(type(module))
    made.__dict__.update({k: v for k, v in module.__dict__.items() if k not in _PATCHED})
    made.__dict__["_compiled_call_impl"] = None  # which would run the original
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


@contextmanager
def weights_fixed(model: nn.Module) -> Iterator[None]:
    """For a while no gradients of the model's own weights are taken, and they go through weights
    that were loaded in inference mode, by copies."""
    asked = [part for part in model.parameters() if part.requires_grad and not part.is_inference()]
    held: list[tuple[dict[str, Any], str, Tensor]] = [
        (cast(Any, own), name, part)
        for module in model.modules()
        for own in (module._parameters, module._buffers)
        for name, part in own.items()
        if part is not None and part.is_inference()
    ]
    for own, name, part in held:
        made = ordinary(part.detach())
        known = isinstance(part, nn.Parameter)
        own[name] = nn.Parameter(made, requires_grad=False) if known else made
    for part in asked:
        part.requires_grad_(False)
    try:
        yield
    finally:
        for own, name, part in held:
            own[name] = part
        for part in asked:
            part.requires_grad_(True)
