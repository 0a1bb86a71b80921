"""Inner products of a feature with the cached ones, in one pass: for training and gradients."""

# mypy: disable-error-code="assignment, misc"
# Kernels grow tuples in unrolled loops.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lesa_kernels.checks import check_features, like, require
from lesa_kernels.config import Config, lookup, programs
from lesa_kernels.device import fetch, slot_bases, tail
from lesa_kernels.launch import GRID_Y, Launch

__all__ = ["gram"]


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["slots"])
def _kernel(
    partials, feature, ring, slots, base, size, length, blocks, samples,
    K: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = K + 2 + (base is not None)
    lane = tl.arange(0, BLOCK)
    bases = slot_bases(slots, size, K)
    for sample in range(tl.program_id(1), samples, tl.num_programs(1)):
        sample = tl.cast(sample, tl.int64)
        sums = ()
        for _ in tl.static_range(COUNT):
            sums += (tl.zeros([BLOCK // VECTOR], tl.float32),)
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            local = tl.cast(block, tl.int64) * BLOCK
            count, begin = tail(length, local, BLOCK), sample * length + local
            x = tl.load(feature + begin + lane, lane < count, other=0.0)
            others = fetch(ring, bases, None, begin, lane, count, 0, K, True)
            if base is not None:
                others += (tl.load(base + begin + lane, lane < count, other=0.0),)
            x = x.to(tl.float32)
            found = (sums[0] + _rows(x, VECTOR), sums[1] + _rows(x * x, VECTOR))
            for i in tl.static_range(COUNT - 2):
                found += (sums[2 + i] + _rows(x * others[i].to(tl.float32), VECTOR),)
            sums = found
        row = partials + (sample * tl.num_programs(0) + tl.program_id(0)) * COUNT
        for i in tl.static_range(COUNT):
            tl.store(row + i, tl.sum(sums[i], axis=0))


@triton.jit
def _rows(x, VECTOR: tl.constexpr):
    """Sums of VECTOR neighbours, which a thread loads together: one register instead of VECTOR."""
    return tl.sum(tl.reshape(x, [x.shape[0] // VECTOR, VECTOR]), axis=1)


def gram(
    feature: Tensor,
    ring: Tensor,
    slots: Tensor,
    out: Tensor,
    *,
    base: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """out[p] = (sum f, <f, f>, <f, ring[slots[0]]>, ..., <f, ring[slots[K - 1]]> (, <f, base>)).

    Each program sums in fp32 and writes its own partials, which are added in float64 in a fixed
    order: two runs agree bit for bit. Every slot named is read, so name filled ones only.

    Args:
        feature: f, [P * ..., ...], contiguous, fp32, fp16 or bf16.
        ring: features [N, *f.shape].
        slots: int32 [K], K = 1..8.
        out: float64 [P, K + 2], or [P, K + 3] with `base`: one row per 1/P of the feature in memory
            order, such as per sample of a batch. Overwritten and returned.
        base: of f's shape.

    Raises:
        LesaError: a wrong shape, dtype, device or layout.
    """
    history = check_features(feature, ring, slots, "feature")
    if base is not None:
        like("base", base, feature)
    size, width = feature.numel(), history + 2 + (base is not None)
    require(
        out.dtype == torch.float64 and out.device == feature.device and out.is_contiguous(),
        f"out is {out.dtype} on {out.device}; it must be float64, contiguous, on {feature.device}",
    )
    require(
        out.ndim == 2 and out.shape[1] == width and out.shape[0] > 0 and size % out.shape[0] == 0,
        f"out has shape {list(out.shape)}; it must be [P, {width}] with P a divisor of {size}",
    )
    if size == 0:
        return out.zero_()
    samples = out.shape[0]
    length = size // samples
    config = config or lookup("gram", feature, history)
    blocks = triton.cdiv(length, config.block)
    share = triton.cdiv(programs(feature.device, config, blocks * samples), samples)
    partials = torch.empty(samples, share, width, dtype=torch.float32, device=feature.device)
    arguments = (partials, feature, ring, slots, base, size, length, blocks, samples)
    vector = min(16 // feature.element_size(), config.block)
    constants = {"K": history, "BLOCK": config.block, "VECTOR": vector}
    grid = share, min(samples, GRID_Y)
    registers = config.registers(1, width - 1, feature.element_size(), beside=2 * width)
    Launch(_kernel, grid, feature.device, config.warps, arguments, constants, registers).run()
    return torch.sum(partials, dim=1, dtype=torch.float64, out=out)
