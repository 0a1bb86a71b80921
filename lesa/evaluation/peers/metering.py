"""Watch a foreign cache while it is on a model, and take back what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lesa.evaluation.method import Use


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Take back what others do to the instances of a model and of its parts.

    New attributes are removed, and the children are in their order again: cache-dit swaps blocks
    for the time of a call and appends them afterwards, but diffusers goes by that order.
    """
    before = [(part, set(vars(part)), dict(part._modules)) for part in model.modules()]
    try:
        yield
    finally:
        for part, names, children in before:
            for name in set(vars(part)) - names:
                del part.__dict__[name]
            part._modules.clear()
            part._modules.update(children)


@contextmanager
def metered(model: Any, states: Callable[[], Any], num_steps: int) -> Iterator[Use]:
    """Count the calls of a model that run its last block, and the most bytes that a cache holds.

    A full call is seen by a hook inside the last block, which a cache steps over. The bytes are
    read after every call, since diffusers drops its states where a generation ends.
    """
    calls = full = peak = 0

    def ran(*_: Any) -> None:
        nonlocal full
        full += 1

    def called(*_: Any) -> None:
        nonlocal calls, peak
        calls += 1
        peak = max(peak, held_bytes(states()))

    inside = next(blocks_of(model)[-1].children())
    handles = inside.register_forward_hook(ran), model.register_forward_hook(called)
    try:
        yield Use(lambda: peak, lambda: full * num_steps / calls if calls else 0.0)
    finally:
        for handle in handles:
            handle.remove()


def held_bytes(value: Any) -> int:
    """Bytes of the tensors in nested tuples and dicts, each storage once."""
    stack, found = [value], {}
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, (tuple, list)):
            stack += item
    return sum(found.values())


def blocks_of(model: Any) -> list[nn.Module]:
    """The transformer blocks in the order in which they run, as diffusers finds them."""
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS as KNOWN

    lists = [part for name, part in model.named_children() if name in KNOWN]
    return [block for part in lists if isinstance(part, nn.ModuleList) for block in part]
