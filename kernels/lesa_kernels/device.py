"""Pieces that the kernels share on the device."""

# mypy: disable-error-code="assignment"
# Kernels grow tuples in unrolled loops.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read(pointer, COUNT: tl.constexpr):
    """COUNT adjacent scalars as a tuple: they stay in registers."""
    values = ()
    for i in tl.static_range(COUNT):
        values += (tl.load(pointer + i),)
    return values


@triton.jit
def slot_bases(slots, size, K: tl.constexpr):
    """Where each slot's feature begins, newest first; 64-bit."""
    bases = ()
    for k in tl.static_range(K):
        bases += (tl.load(slots + k).to(tl.int64) * size,)
    return bases


@triton.jit
def bounds(weights, size, COUNT: tl.constexpr):
    """The size, or 0 where the weight is 0: what has no weight is not read, NaN or not."""
    limits = ()
    for k in tl.static_range(COUNT):
        limits += (tl.where(weights[k] != 0, size, 0),)
    return limits


@triton.jit
def weigh(ring, bases, weights, limits, place, index, K: tl.constexpr):
    """sum_k weights[k] * ring[bases[k] + place] in fp32, where index < limits[k]."""
    total = tl.zeros(place.shape, tl.float32)
    for k in tl.static_range(K):
        x = tl.load(ring + bases[k] + place, index < limits[k], other=0.0)
        total = tl.fma(weights[k], x.to(tl.float32), total)
    return total
