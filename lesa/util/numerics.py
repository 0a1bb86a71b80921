"""What fits need of torch, whatever the device and whatever mode the caller is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

__all__ = ["float64", "free_memory", "gradients"]


def float64(values: Tensor) -> Tensor:
    """`values` in float64: where they lie, or on the host where their device has none, as MPS."""
    return (values if _has_float64(values.device) else values.cpu()).double()


@cache
def _has_float64(device: torch.device) -> bool:
    try:
        torch.zeros(1, dtype=torch.float64, device=device).add_(1)
    except (TypeError, RuntimeError):
        return False
    return True


@contextmanager
def gradients() -> Iterator[None]:
    """Gradients for a fit, also under `no_grad`, `inference_mode` or `set_grad_enabled(False)`."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; for those that cannot tell, on the host."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil  # of accelerate

    return int(psutil.virtual_memory().available)
