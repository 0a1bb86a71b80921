"""Which implementation of the kernels runs: Triton, the compiled csrc, or eager PyTorch.

The environment variable LESA_BACKEND ("auto", "triton", "native" or "eager") forces one.
"""

from __future__ import annotations

import os
from functools import cache

import torch

from lesa.errors import LesaError
from lesa.ops import native

__all__ = ["BACKENDS", "active", "wanted", "why_not"]

VARIABLE, AUTO = "LESA_BACKEND", "auto"
BACKENDS = ("triton", "native", "eager")  # the first that works on a device is taken


def active(device: torch.device | str = "cpu") -> str:
    """Name of the backend for tensors on `device`.

    Raises:
        LesaError: LESA_BACKEND names an unknown backend, or one that does not work there.
    """
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    return _active(kind, wanted())


def wanted() -> str:
    """What LESA_BACKEND asks for, "auto" where it is not set or empty; LesaError if unknown."""
    name = os.environ.get(VARIABLE) or AUTO
    if name not in (AUTO, *BACKENDS):
        raise LesaError(f"{VARIABLE}={name!r}: no backend; set it to {AUTO}, {', '.join(BACKENDS)}")
    return name


@cache
def _active(kind: str, wanted: str) -> str:
    if wanted == AUTO:
        return next(name for name in BACKENDS if not why_not(name, kind))
    # Triton's interpreter runs on the CPU: far too slow to be chosen, good enough to be forced.
    interpreted = wanted == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if (reason := why_not(wanted, kind)) and not interpreted:
        raise LesaError(f"{VARIABLE}={wanted!r}: {reason.rstrip('.')}; set it to {AUTO}")
    return wanted


@cache
def why_not(name: str, kind: str) -> str:
    """Why a backend is not used on a device type, in one sentence; empty where it is."""
    if name == "native":
        return native.why_not(kind) if kind in ("cpu", "cuda") else f"it does not run on {kind}."
    if name == "triton":
        from lesa_kernels import triton_version

        if triton_version() is None:
            return "Triton is not installed; pip install '.[kernels]' in the checkout (Linux)."
        if kind != "cuda":
            return f"Triton compiles for GPUs, not for {kind!r}."
    return ""
