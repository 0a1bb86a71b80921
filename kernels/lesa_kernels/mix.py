"""The weighted sum of cached features: each is read once, the result is written once."""

# mypy: disable-error-code="assignment"
# Kernels grow tuples in unrolled loops.

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lesa_kernels.checks import check_bias, check_mix, check_table
from lesa_kernels.config import Config, lookup, programs
from lesa_kernels.device import fetch, read, slot_bases, tail, weigh
from lesa_kernels.launch import Launch, Prepared

__all__ = ["mix", "prepare_mix"]


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["slots", "step"])
def _flat_kernel(
    out, ring, slots, table, step, latent, bias, size, blocks, K: tl.constexpr, BLOCK: tl.constexpr,
    ONCE: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = K + (latent is not None)
    lane = tl.arange(0, BLOCK)
    if ONCE:  # one tile per program: no load of a feature waits for the weights
        begin = tl.program_id(0).to(tl.int64) * BLOCK
        count = tail(size, begin, BLOCK)
        inside = lane < count
        x = 0.0
        if latent is not None:
            x = tl.load(latent + begin + lane, inside, other=0.0)
        s = tl.load(step).to(tl.int64)
        features = fetch(ring, slot_bases(slots, size, K), None, begin, lane, count, 0, K, True)
        weights = read(table + s * WIDTH, WIDTH)
        total = tl.zeros([BLOCK], tl.float32)
        if bias is not None:
            total += tl.load(bias + s)
        if latent is not None:
            total = weigh(total, (x,), weights, K, WIDTH, True)
        total = weigh(total, features, weights, 0, K, True)
        tl.store(out + begin + lane, total.to(out.dtype.element_ty), inside)
    else:
        s = tl.load(step).to(tl.int64)
        bases = slot_bases(slots, size, K)
        weights = read(table + s * WIDTH, WIDTH)
        shift = 0.0
        if bias is not None:
            shift = tl.load(bias + s)
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            begin = tl.cast(block, tl.int64) * BLOCK
            count = tail(size, begin, BLOCK)
            x = 0.0
            if latent is not None:
                known = tl.where(weights[K] != 0, count, 0)
                x = tl.load(latent + begin + lane, lane < known, other=0.0)
            features = fetch(ring, bases, weights, begin, lane, count, 0, K, False)
            total = tl.zeros([BLOCK], tl.float32) + shift
            if latent is not None:
                total = weigh(total, (x,), weights, K, WIDTH, False)
            total = weigh(total, features, weights, 0, K, False)
            tl.store(out + begin + lane, total.to(out.dtype.element_ty), lane < count)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["slots", "step"])
def _banded_kernel(
    out, ring, slots, table, step, latent, bias,
    size, rows, columns, bands, band_size, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.load(step).to(tl.int64)
    WIDTH: tl.constexpr = K + (latent is not None)
    lane = tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    count = tail(columns, first, BLOCK)
    inside = lane < count
    band = (first + lane) // band_size
    bases = slot_bases(slots, size, K)
    weights = ()
    for k in tl.static_range(WIDTH):
        weights += (tl.load(table + (s * WIDTH + k) * bands + band, inside, other=0.0),)
    shift = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        shift = tl.load(bias + s * bands + band, inside, other=0.0)
    for row in range(tl.program_id(1), rows, tl.num_programs(1)):
        begin = tl.cast(row, tl.int64) * columns + first
        x = 0.0
        if latent is not None:
            x = tl.load(latent + begin + lane, inside, other=0.0)
        features = fetch(ring, bases, None, begin, lane, count, 0, K, True)
        total = shift
        if latent is not None:
            total = weigh(total, (x,), weights, K, WIDTH, True)
        total = weigh(total, features, weights, 0, K, True)
        tl.store(out + begin + lane, total.to(out.dtype.element_ty), inside)


def mix(
    ring: Tensor,
    slots: Tensor,
    table: Tensor,
    step: Tensor,
    out: Tensor,
    *,
    latent: Tensor | None = None,
    bias: Tensor | None = None,
    band_size: int | None = None,
    config: Config | None = None,
) -> Tensor:
    """out = sum_k table[s, k] * ring[slots[k]] (+ table[s, K] * latent) (+ bias[s]).

    Sums in fp32 and rounds once. What has weight 0 is not used, NaN or not. `out` may be one of the
    ring's slots. Fastest where a feature has a multiple of 16 elements.

    Args:
        ring: features [N, ...], contiguous, fp32, fp16 or bf16.
        slots: int32 [K], the slot of each column, newest first; K = 1..8.
        table: fp32 [S, K], or [S, K + 1] with `latent`; or [S, K (+ 1), G] for G bands: element i
            of a feature takes the coefficient of band (i // band_size) % G.
        step: s as an integer tensor of one element.
        out: of a feature's shape, overwritten and returned.
        latent: of a feature's shape, of any of the three dtypes.
        bias: fp32 [S], or [S, G].
        band_size: defaults to C / G of the last dimension C: one coefficient per channel at G = C.

    Raises:
        LesaError: a wrong shape, dtype, device or layout, or `out` that overlaps two slots.
    """
    launch = _plan(ring, slots, table, step, out, latent, bias, band_size, config)
    if launch is not None:
        launch.run()
    return out


def prepare_mix(
    ring: Tensor,
    table: Tensor,
    *,
    bias: Tensor | None = None,
    band_size: int | None = None,
    config: Config | None = None,
) -> Prepared:
    """`mix` for many steps: call it with (slots, step, out) or (slots, step, out, latent)."""

    def plan(slots: Tensor, step: Tensor, out: Tensor, latent: Tensor | None = None) -> Any:
        return _plan(ring, slots, table, step, out, latent, bias, band_size, config)

    return Prepared(plan, ring, ("slots", "step", "out", "latent"))


def _plan(
    ring: Tensor, slots: Tensor, table: Tensor, step: Tensor, out: Tensor, latent: Tensor | None,
    bias: Tensor | None, band_size: int | None, config: Config | None,
) -> Launch | None:  # fmt: skip
    """Checked; None for an empty feature."""
    history = check_mix(ring, slots, step, out, latent)
    bands, band_size = check_table(table, history + (latent is not None), out, band_size)
    check_bias(bias, table, bands)
    size = out.numel()
    if size == 0:
        return None
    config = config or lookup("mix" if bands == 1 else "mix_banded", out, history)
    arguments = (out, ring, slots, table, step, latent, bias, size)
    constants = {"K": history, "BLOCK": config.block}
    if bands == 1:
        blocks = triton.cdiv(size, config.block)
        grid: tuple[int, ...] = (programs(out.device, config, blocks),)
        arguments += (blocks,)
        constants["ONCE"] = once = grid[0] == blocks
        registers = once * config.registers(1, table.shape[1], ring.element_size())
        return Launch(_flat_kernel, grid, out.device, config.warps, arguments, constants, registers)
    columns = bands * band_size
    rows, blocks = size // columns, triton.cdiv(columns, config.block)
    grid = blocks, triton.cdiv(programs(out.device, config, rows * blocks), blocks)
    arguments += (rows, columns, bands, band_size)
    return Launch(_banded_kernel, grid, out.device, config.warps, arguments, constants)
