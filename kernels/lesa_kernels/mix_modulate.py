"""Mix, layer norm and modulation in one pass: what the last projection of a denoiser wants."""

# mypy: disable-error-code="assignment, misc, var-annotated"
# Kernels grow tuples in unrolled loops.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lesa_kernels.checks import FEATURES, check_bias, check_mix, check_rows, like, require
from lesa_kernels.config import Config, lookup, programs
from lesa_kernels.device import fetch, read, slot_bases, weigh
from lesa_kernels.launch import Launch, Prepared

__all__ = ["mix_modulate", "prepare_mix_modulate"]


@triton.jit
def _add(total_a, square_a, total_b, square_b):
    return total_a + total_b, square_a + square_b


@triton.jit(do_not_specialize=["rows", "share"], do_not_specialize_on_alignment=["slots", "step"])
def _kernel(
    out, feature, ring, slots, table, step, scale, shift, bias,
    size, rows, share, columns, step_stride, sample_stride, eps,
    K: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    s = tl.load(step).to(tl.int64)
    bases = slot_bases(slots, size, K)
    weights = read(table + s * K, K)
    added = 0.0
    if bias is not None:
        added = tl.load(bias + s)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        begin = tl.cast(row, tl.int64) * columns
        features = ()
        for chunk in tl.static_range(CHUNKS):
            first = chunk * BLOCK
            count = BLOCK if EVEN else columns - first
            features += (fetch(ring, bases, weights, begin + first, lane, count, 0, K, False),)
        heads = ()
        for k in tl.static_range(K):
            heads += (tl.load(ring + (bases[k] + begin), weights[k] != 0, other=0.0),)
        # The row's first number is near its mean where that is large: the sums count from there.
        pivot = weigh(added, heads, weights, 0, K, False)
        parts = ()
        total, square = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            part = tl.zeros([BLOCK], tl.float32) + (added - pivot)
            part = weigh(part, features[chunk], weights, 0, K, False)
            if not EVEN:
                part = tl.where(lane < columns - chunk * BLOCK, part, 0.0)
            total, square = total + part, tl.fma(part, part, square)
            parts += (part,)
        total, square = tl.reduce((total, square), 0, _add)
        mean = total / columns
        inverse = tl.rsqrt(tl.maximum(square / columns - mean * mean, 0.0) + eps)
        modulation = s * step_stride + tl.cast(row // share, tl.int64) * sample_stride
        for chunk in tl.static_range(CHUNKS):
            column = chunk * BLOCK + lane
            inside = column < columns
            gain = tl.load(scale + modulation + column, inside, other=0.0).to(tl.float32)
            offset = tl.load(shift + modulation + column, inside, other=0.0).to(tl.float32)
            if feature is not None:
                kept = (parts[chunk] + pivot).to(feature.dtype.element_ty)
                tl.store(feature + begin + column, kept, inside)
            value = tl.fma(parts[chunk] - mean, tl.fma(gain, inverse, inverse), offset)
            tl.store(out + begin + column, value.to(out.dtype.element_ty), inside)


def mix_modulate(
    ring: Tensor,
    slots: Tensor,
    table: Tensor,
    step: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    feature: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """out = layer_norm(h) * (1 + scale) + shift with h = sum_k table[s, k] * ring[slots[k]] (+ b).

    The norm runs over the last dimension C and has no parameters of its own (diffusers'
    AdaLayerNormContinuous, whose scale and shift are two chunks of one row). h stays in fp32. Its
    moments are taken in one pass, from the row's first number on: no digit is lost to a large mean,
    and at most C * 2^-22 of the variance to a first number far from all others.

    Args:
        ring, slots, step, bias: as in `mix`; features are [B, ..., C].
        table: fp32 [S, K].
        scale, shift: [B, C], or [S, B, C] for a whole schedule; views with the same strides, the
            last of which is 1.
        out: of a feature's shape, overwritten and returned; not a slot of the ring.
        eps: of the layer norm.
        feature: where h is wanted too (autoregressive tables): it goes there, also into the ring.

    Raises:
        LesaError: a wrong shape, dtype, device or layout.
    """
    launch = _plan(ring, slots, table, step, scale, shift, out, feature, bias, eps, config)
    if launch is not None:
        launch.run()
    return out


def prepare_mix_modulate(
    ring: Tensor,
    table: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    config: Config | None = None,
) -> Prepared:
    """`mix_modulate` for many steps: call it with (slots, step, scale, shift, out (, feature))."""

    def plan(
        slots: Tensor, step: Tensor, scale: Tensor, shift: Tensor, out: Tensor,
        feature: Tensor | None = None,
    ) -> Launch | None:  # fmt: skip
        return _plan(ring, slots, table, step, scale, shift, out, feature, bias, eps, config)

    names = ("slots", "step", "scale", "shift", "out", "feature")
    return Prepared(plan, ring, names, results=("out", "feature"))


def _plan(
    ring: Tensor, slots: Tensor, table: Tensor, step: Tensor, scale: Tensor, shift: Tensor,
    out: Tensor, feature: Tensor | None, bias: Tensor | None, eps: float, config: Config | None,
) -> Launch | None:  # fmt: skip
    """Checked; None for an empty feature."""
    history = check_mix(ring, slots, step, out)
    check_rows(table, history, out)
    check_bias(bias, table, 1)
    check_modulation(scale, shift, out, table.shape[0])
    offset = out.data_ptr() - ring.data_ptr()
    require(
        not out.numel() or not 0 <= offset < ring.numel() * ring.element_size(),
        "out is a slot of the ring; mix_modulate writes no feature there, pass another tensor",
    )
    if feature is not None:
        like("feature", feature, out)
        check_mix(ring, slots, step, feature)
    size = out.numel()
    if size == 0:
        return None
    config = config or lookup("mix_modulate", out, history)
    columns = out.shape[-1]
    rows, block = size // columns, min(config.block, triton.next_power_of_2(columns))
    arguments = (
        out, feature, ring, slots, table, step, scale, shift, bias,
        size, rows, rows // out.shape[0], columns,
        scale.stride(0) if scale.ndim == 3 else 0, scale.stride(-2), eps,
    )  # fmt: skip
    constants = {"K": history, "CHUNKS": triton.cdiv(columns, block), "BLOCK": block}
    constants["EVEN"] = columns % block == 0
    grid = (programs(out.device, config, rows),)
    chunks = constants["CHUNKS"]  # half of the sums are made of loads that have come by then
    registers = config.registers(chunks // 2, history * chunks, ring.element_size())
    return Launch(_kernel, grid, out.device, config.warps, arguments, constants, registers)


def check_modulation(scale: Tensor, shift: Tensor, out: Tensor, steps: int) -> None:
    """Rows of C numbers, one per sample (and step)."""
    require(out.ndim >= 2, f"out has shape {list(out.shape)}; modulated features are [B, ..., C]")
    wanted = torch.Size((out.shape[0], out.shape[-1]))
    for name, tensor in (("scale", scale), ("shift", shift)):
        require(
            tensor.shape in (wanted, (steps, *wanted)),
            f"{name} has shape {list(tensor.shape)}; it must be {list(wanted)} or "
            f"{[steps, *wanted]}",
        )
        require(
            tensor.dtype in FEATURES and tensor.device == out.device and tensor.stride(-1) == 1,
            f"{name} is {tensor.dtype} on {tensor.device} with strides {list(tensor.stride())}; "
            f"the kernel takes fp32, fp16 or bf16 on {out.device} with a last stride of 1",
        )
    require(
        scale.stride() == shift.stride() and scale.dtype == shift.dtype,
        f"scale has strides {list(scale.stride())} and {scale.dtype}, shift "
        f"{list(shift.stride())} and {shift.dtype}; make them two chunks of one tensor",
    )
