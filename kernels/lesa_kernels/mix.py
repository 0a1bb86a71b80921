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
from lesa_kernels.device import bounds, read, slot_bases, weigh
from lesa_kernels.launch import Launch, Prepared

__all__ = ["mix", "prepare_mix"]


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["slots", "step"])
def _flat_kernel(
    out, ring, slots, table, step, latent, bias, size, blocks, K: tl.constexpr, BLOCK: tl.constexpr
):
    s = tl.load(step).to(tl.int64)
    WIDTH: tl.constexpr = K + (latent is not None)
    bases = slot_bases(slots, size, K)
    weights = read(table + s * WIDTH, WIDTH)
    limits = bounds(weights, size, WIDTH)
    shift = 0.0
    if bias is not None:
        shift = tl.load(bias + s)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        place = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total = weigh(ring, bases, weights, limits, place, place, K)
        if latent is not None:
            x = tl.load(latent + place, place < limits[K], other=0.0)
            total = tl.fma(weights[K], x.to(tl.float32), total)
        tl.store(out + place, (total + shift).to(out.dtype.element_ty), place < size)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["slots", "step"])
def _banded_kernel(
    out, ring, slots, table, step, latent, bias,
    size, rows, columns, bands, band_size, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.load(step).to(tl.int64)
    WIDTH: tl.constexpr = K + (latent is not None)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    band = column // band_size
    bases = slot_bases(slots, size, K)
    weights = ()
    for k in tl.static_range(WIDTH):
        weights += (tl.load(table + (s * WIDTH + k) * bands + band, inside, other=0.0),)
    shift = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        shift = tl.load(bias + s * bands + band, inside, other=0.0)
    for row in range(tl.program_id(1), rows, tl.num_programs(1)):
        place = tl.cast(row, tl.int64) * columns + column
        total = shift
        for k in tl.static_range(WIDTH):
            if k < K:
                x = tl.load(ring + bases[k] + place, inside, other=0.0)
            else:
                x = tl.load(latent + place, inside, other=0.0)
            x = tl.where(weights[k] != 0, x.to(tl.float32), 0.0)
            total = tl.fma(weights[k], x, total)
        tl.store(out + place, total.to(out.dtype.element_ty), inside)


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
        return Launch(_flat_kernel, grid, out.device, config.warps, arguments, constants)
    columns = bands * band_size
    rows, blocks = size // columns, triton.cdiv(columns, config.block)
    grid = blocks, triton.cdiv(programs(out.device, config, rows * blocks), blocks)
    arguments += (rows, columns, bands, band_size)
    return Launch(_banded_kernel, grid, out.device, config.warps, arguments, constants)
