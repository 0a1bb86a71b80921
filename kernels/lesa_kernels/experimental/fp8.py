"""A ring in fp8: half the bytes of bf16, one fp32 scale per token."""

# mypy: disable-error-code="assignment, misc, var-annotated"
# Kernels grow tuples in unrolled loops.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from lesa_kernels.checks import (
    check_bias,
    check_features,
    check_rows,
    check_step,
    like,
    plain,
    require,
)
from lesa_kernels.config import Config, lookup, programs
from lesa_kernels.device import bounds, read, slot_bases
from lesa_kernels.launch import Launch

__all__ = ["mix_fp8", "push_fp8"]

FP8 = torch.float8_e4m3fn
LARGEST = tl.constexpr(448.0)
WIDEST = 1024  # columns of a tile: 3072 and 5120 are multiples


@triton.jit
def _decode(code):
    """e4m3 bits to fp32; by hand where the hardware cannot (before sm_89)."""
    if cuda_capability_geq(8, 9):
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    wide = code.to(tl.uint16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)  # fp16 has the exponent bias 15, e4m3 has 7
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def _encode(value):
    """fp32 within +-448 to e4m3 bits, to the nearest, ties to even."""
    if cuda_capability_geq(8, 9):
        return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = (tl.abs(value) * 2.0**-120).to(tl.uint32, bitcast=True)  # exponent bias 127 to 7
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    return (bits + tl.where(value < 0, 0x80, 0)).to(tl.uint8)


@triton.jit(do_not_specialize_on_alignment=["slot"])
def _push_kernel(
    codes, scales, feature, slot, size, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    target = tl.load(slot).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        place = row[:, None] * columns + column
        inside = (row < rows)[:, None] & (column < columns)
        x = tl.load(feature + place, inside, other=0.0).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-30) / LARGEST
        tl.store(scales + target * rows + row, scale, row < rows)
        tl.store(codes + target * size + place, _encode(x / scale[:, None]), inside)


@triton.jit(do_not_specialize_on_alignment=["slots", "step"])
def _mix_kernel(
    out, codes, scales, slots, table, step, latent, bias, size, rows, columns,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    s = tl.load(step).to(tl.int64)
    WIDTH: tl.constexpr = K + (latent is not None)
    bases, starts = slot_bases(slots, size, K), slot_bases(slots, rows, K)
    weights = read(table + s * WIDTH, WIDTH)
    limits = bounds(weights, rows, WIDTH)
    shift = 0.0
    if bias is not None:
        shift = tl.load(bias + s)
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    for block in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        place = row[:, None] * columns + column
        codes_of, scales_of = (), ()
        for k in tl.static_range(K):
            known = row < limits[k]
            mask = known[:, None] & (column < columns)
            codes_of += (tl.load(codes + bases[k] + place, mask, other=0),)
            scales_of += (tl.load(scales + starts[k] + row, known, other=0.0),)
        total = tl.zeros([ROWS, COLUMNS], tl.float32) + shift
        if latent is not None:
            mask = (row < limits[K])[:, None] & (column < columns)
            x = tl.load(latent + place, mask, other=0.0).to(tl.float32)
            total = tl.fma(weights[K], x, total)
        for k in tl.static_range(K):
            scale = scales_of[k] * weights[k]
            total = tl.fma(scale[:, None], _decode(codes_of[k]), total)
        inside = (row < rows)[:, None] & (column < columns)
        tl.store(out + place, total.to(out.dtype.element_ty), inside)


def push_fp8(
    feature: Tensor,
    ring: Tensor,
    scales: Tensor,
    slot: Tensor,
    *,
    config: Config | None = None,
) -> None:
    """ring[slot] = e4m3(feature / scale), scales[slot] = max |feature| of each token / 448.

    Args:
        feature: [..., C], contiguous, fp32, fp16 or bf16, finite; a token is a row of C.
        ring: float8_e4m3fn [N, ..., C], contiguous.
        scales: fp32 [N, tokens].
        slot: the slot to overwrite as an int32 tensor of one element.

    Raises:
        LesaError: a wrong shape, dtype, device or layout.
    """
    plain("slot", slot, (torch.int32,), feature.device)
    rows, columns = _check_ring("feature", feature, ring, scales, slot.view(-1))
    if feature.numel() == 0:
        return
    config = config or lookup("push_fp8", feature, 1)
    width = triton.next_power_of_2(columns)
    height = max(1, config.block // width)
    most = programs(feature.device, config, triton.cdiv(rows, height))
    arguments = (
        ring.view(torch.uint8), scales, feature, slot, feature.numel(), rows, columns
    )  # fmt: skip
    constants = {"ROWS": height, "COLUMNS": width}
    Launch(_push_kernel, (most,), feature.device, config.warps, arguments, constants).run()


def mix_fp8(
    ring: Tensor,
    scales: Tensor,
    slots: Tensor,
    table: Tensor,
    step: Tensor,
    out: Tensor,
    *,
    latent: Tensor | None = None,
    bias: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """`mix` over a ring that `push_fp8` filled: the feature k is ring[slots[k]] * scales[slots[k]].

    Args:
        ring, scales: as in `push_fp8`.
        slots, table, step, out, latent, bias: as in `mix`, without bands.

    Raises:
        LesaError: a wrong shape, dtype, device or layout.
    """
    rows, columns = _check_ring("out", out, ring, scales, slots)
    history = slots.numel()
    check_step(step, out.device)
    check_rows(table, history + (latent is not None), out)
    check_bias(bias, table, 1)
    if latent is not None:
        like("latent", latent, out)
    if out.numel() == 0:
        return out
    config = config or lookup("mix_fp8", out, history)
    width = min(triton.next_power_of_2(columns), WIDEST, config.block)
    height, blocks = config.block // width, triton.cdiv(columns, width)
    most = programs(out.device, config, blocks * triton.cdiv(rows, height))
    arguments = (
        out, ring.view(torch.uint8), scales, slots, table, step, latent, bias,
        out.numel(), rows, columns,
    )  # fmt: skip
    constants = {"K": history, "ROWS": height, "COLUMNS": width}
    grid = blocks, triton.cdiv(most, blocks)
    registers = config.registers(1, history, ring.element_size())
    Launch(_mix_kernel, grid, out.device, config.warps, arguments, constants, registers).run()
    return out


def _check_ring(
    name: str, feature: Tensor, ring: Tensor, scales: Tensor, slots: Tensor
) -> tuple[int, int]:
    """Tokens and channels."""
    check_features(feature, ring, slots, name, (FP8,))
    columns = feature.shape[-1] if feature.ndim else 1
    rows = feature.numel() // columns if columns else 0
    plain("scales", scales, (torch.float32,), feature.device)
    require(
        scales.shape == (ring.shape[0], rows),
        f"scales has shape {list(scales.shape)}; it must be [{ring.shape[0]}, {rows}], "
        "one per slot and token",
    )
    return rows, columns
