"""Kernels run in Triton's interpreter, or on the GPU where there is one (or TRITON_INTERPRET=0)."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.setdefault(
    "TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1"
) not in ("", "0")

if find_spec("triton") is None:  # no wheel for macOS and Windows
    collect_ignore_glob = ["test_*.py"]
elif INTERPRETED:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    if not isinstance(tl.sum, interpreter.InterpretedFunction):
        raise pytest.UsageError(
            "triton was imported before tests/kernels could set TRITON_INTERPRET=1; set it outside"
        )
    truncating = interpreter._convert_float

    def convert_float(data, source, target, rounding):
        """Triton's interpreter truncates fp32 to bf16, the hardware rounds to nearest even."""
        if source != tl.float32 or target != tl.bfloat16:
            return truncating(data, source, target, rounding)
        bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)

    interpreter._convert_float = convert_float


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def rand(device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return make


@pytest.fixture
def integers(device: torch.device) -> Callable[..., Tensor]:
    return lambda *values: torch.tensor(values, dtype=torch.int32, device=device)


@pytest.fixture
def poisoned(device: torch.device) -> Callable[..., Tensor]:
    """A result tensor that no test passes with unless all of it was written."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    return make


@pytest.fixture
def rounded_once() -> Callable[[Tensor, Tensor, float], None]:
    """Whether `out` is the float64 `exact`, rounded to nearest once after sums in fp32.

    The bound is half a unit in the last place, plus 16 rounding errors of fp32 at the size of the
    sum's terms; a second rounding, or a truncation, of bf16 or fp16 breaks it.
    """

    def check(out: Tensor, exact: Tensor, terms: float) -> None:
        info = torch.finfo(out.dtype)
        half = (info.eps / 2 * exact.abs()).clamp(min=info.smallest_normal * info.eps / 2)
        error = (out.double() - exact).abs()
        assert exact.dtype == torch.float64
        assert bool((error <= half * 1.001 + 2**-20 * terms).all()), float((error - half).max())

    return check
