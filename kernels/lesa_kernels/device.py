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
def fetch(
    ring, bases, weights, begin, lane, count, FIRST: tl.constexpr, K: tl.constexpr,
    EAGER: tl.constexpr,
):  # fmt: skip
    """ring[bases[k] + begin + lane] where lane < count, for k = FIRST..K - 1.

    All are asked for before any is used. What has no weight is not read; EAGER it is, and `weigh`
    drops it: a load need not wait for the weights then.
    """
    found = ()
    for k in tl.static_range(FIRST, K):
        place = ring + (bases[k] + begin) + lane
        if EAGER:
            found += (tl.load(place, lane < count, other=0.0),)
        else:
            found += (tl.load(place, lane < tl.where(weights[k] != 0, count, 0), other=0.0),)
    return found


@triton.jit
def weigh(total, features, weights, FIRST: tl.constexpr, K: tl.constexpr, EAGER: tl.constexpr):
    """total + sum_k weights[k] * features[k - FIRST] in fp32, NaN without weight left out."""
    for k in tl.static_range(FIRST, K):
        x = features[k - FIRST].to(tl.float32)
        if EAGER:
            x = tl.where(weights[k] != 0, x, 0.0)
        total = tl.fma(weights[k], x, total)
    return total


@triton.jit
def tail(size, begin, BLOCK: tl.constexpr):
    """How many of the BLOCK elements from `begin` on there are; 32-bit."""
    return tl.minimum(size - begin, BLOCK).to(tl.int32)
