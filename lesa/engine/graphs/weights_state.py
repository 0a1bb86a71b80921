"""What a recorded step takes for granted about the modules whose weights it reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

__all__ = ["signature"]

# What PEFT's layers keep outside their parameters, and a graph would bake in.
_ADAPTER = ("scaling", "merged_adapters", "_active_adapter", "_disable_adapters")


def signature(modules: Iterable[nn.Module]) -> tuple[Any, ...]:
    """What a graph takes for granted about modules; compared before every replay.

    The memory, version, dtype, device and layout of each parameter and buffer, the identity, class
    and mode of each module, and the state of PEFT's adapters: read from the tensors themselves, so
    a change that failed half way shows too. A write through `.data` to the same memory does not: a
    replay reads the new values, but what `make_body` derived from the old ones stays.
    """
    found: list[Any] = []
    pending: list[nn.Module | None] = list(modules)
    for module in pending:  # grows on the way
        if module is None:
            continue
        own = vars(module)
        found += (id(module), type(module), own["training"])
        found += [_frozen(own[name]) for name in _ADAPTER if name in own]
        found += [_frozen(tensor) for tensor in own["_parameters"].values()]
        found += [_frozen(tensor) for tensor in own["_buffers"].values()]
        pending += own["_modules"].values()
    return tuple(found)


def _frozen(value: Any) -> Any:
    """A copy that compares by value; of a tensor, where its values lie."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):  # quantised or sharded: a shell around others
            return tuple(_frozen(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        version = 0 if value.is_inference() else value._version
        return value.data_ptr(), version, value.dtype, value.device, value.shape, value.stride()
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in value.items())
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value
