"""The denoiser inside of what wraps it: a compiled, parallel, sharded or adapted model."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

__all__ = ["core_of"]

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
