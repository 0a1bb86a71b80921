"""Which function of which backend runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from lesa_kernels.checks import FEATURES, MAX_HISTORY
from torch import Tensor

from lesa.ops import backend, eager, native

__all__ = ["implementation"]


def implementation(
    name: str, feature: Tensor, history: int, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The function `name` of the backend that is active on the feature's device and can take it.

    `options` are the optional arguments that it will be called with.
    """
    chosen = backend.active(feature.device)
    if chosen == "triton" and feature.dtype in FEATURES and history <= MAX_HISTORY:
        return _triton(name)
    if chosen == "native" and native.takes(name, feature, options or {}):
        return getattr(native, name)
    return getattr(eager, name)


@cache
def _triton(name: str) -> Callable[..., Any]:
    """Imported on first use: Triton has no wheel for macOS and Windows."""
    if name == "mix_backward":
        return import_module("lesa_kernels.experimental.mix_backward").mix_gradients
    folder = "lesa_kernels.experimental" if name == "gram" else "lesa_kernels"
    return getattr(import_module(f"{folder}.{name}"), name)
