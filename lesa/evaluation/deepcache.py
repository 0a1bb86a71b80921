"""DeepCache as a peer for U-Nets: its authors' own package, behind one context manager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lesa.errors import LesaError


@contextmanager
def deepcache(pipe: Any, interval: int) -> Iterator[Callable[[], int]]:
    """DeepCache on a pipeline for a while; gives a function that tells the bytes it holds.

    Every `interval`-th step is computed in full. At the others `conv_in`, the last residual block
    of the U-Net and its output layers run on the current latent, with the deep feature of the last
    full step in place of all other blocks (cache branch 0). The pipeline is as before afterwards.
    Source: DeepCache (arXiv 2312.00858).

    Raises: LesaError if the pipeline has no U-Net or the package is not installed.
    """
    if getattr(pipe, "unet", None) is None:
        raise LesaError(
            f"methods: 'deepcache' needs a U-Net, {type(pipe).__name__} has none; leave it out"
        )
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError as error:
        raise LesaError(
            f"methods: 'deepcache' is not usable ({error}); run pip install '.[eval]'"
        ) from None
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    try:
        yield lambda: _bytes(helper.cached_output)
    finally:
        helper.disable()
        _forget_forwards(pipe.unet)


def _bytes(value: Any) -> int:
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


def _forget_forwards(unet: Any) -> None:
    """Remove the instance attributes that the package leaves: they hold bound methods, which a
    copy or a pickle of the model would take along."""
    for module in unet.modules():
        own = module.__dict__.get("forward")
        if getattr(own, "__func__", None) is type(module).forward:
            del module.__dict__["forward"]
