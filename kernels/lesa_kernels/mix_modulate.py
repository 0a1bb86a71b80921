"""Mix, layer norm and modulation in one pass: what the last projection of a denoiser wants."""

# mypy: disable-error-code="assignment, misc, var-annotated"
# Kernels grow tuples in unrolled loops.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lesa_kernels.checks import FEATURES, check_bias, check_mix, check_table, like, require
from lesa_kernels.config import Config, lookup, programs
from lesa_kernels.device import bounds, read, slot_bases, weigh

__all__ = ["mix_modulate"]


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["slots", "step"])
def _kernel(
    out, feature, ring, slots, table, step, scale, shift, bias,
    size, rows, columns, step_stride, sample_stride, eps,
    K: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.load(step).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    bases = slot_bases(slots, size, K)
    weights = read(table + s * K, K)
    limits = bounds(weights, columns, K)
    b = 0.0
    if bias is not None:
        b = tl.load(bias + s)
    modulation = s * step_stride + sample * sample_stride
    gains, shifts = (), ()
    for chunk in tl.static_range(CHUNKS):
        column = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        gain = tl.load(scale + modulation + column, inside, other=0.0)
        gains += (gain.to(tl.float32) + 1,)
        shifts += (tl.load(shift + modulation + column, inside, other=0.0).to(tl.float32),)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = (sample * rows + row) * columns
        parts = ()
        total = tl.zeros([BLOCK], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            column = chunk * BLOCK + tl.arange(0, BLOCK)
            part = weigh(ring, bases, weights, limits, start + column, column, K)
            part = tl.where(column < columns, part + b, 0.0)
            parts += (part,)
            total += part
        mean = tl.sum(total, axis=0) / columns
        square = tl.zeros([BLOCK], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            column = chunk * BLOCK + tl.arange(0, BLOCK)
            centred = tl.where(column < columns, parts[chunk] - mean, 0.0)
            square = tl.fma(centred, centred, square)
        inverse = tl.rsqrt(tl.sum(square, axis=0) / columns + eps)
        for chunk in tl.static_range(CHUNKS):
            column = chunk * BLOCK + tl.arange(0, BLOCK)
            inside = column < columns
            if feature is not None:
                kept = parts[chunk].to(feature.dtype.element_ty)
                tl.store(feature + start + column, kept, inside)
            value = tl.fma((parts[chunk] - mean) * inverse, gains[chunk], shifts[chunk])
            tl.store(out + start + column, value.to(out.dtype.element_ty), inside)


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
    AdaLayerNormContinuous, whose scale and shift are two chunks of one row). h stays in fp32.

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
    history = check_mix(ring, slots, step, out)
    check_table(table, history, out, band_size=1)
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
        return out
    config = config or lookup("mix_modulate", out, history)
    samples, columns = out.shape[0], out.shape[-1]
    rows = size // (samples * columns)
    block = min(config.block, triton.next_power_of_2(columns))
    most = programs(out.device, config, rows * samples)
    _kernel[(triton.cdiv(most, samples), samples)](
        out, feature, ring, slots, table, step, scale, shift, bias,
        size, rows, columns, scale.stride(0) if scale.ndim == 3 else 0, scale.stride(-2), eps,
        K=history, CHUNKS=triton.cdiv(columns, block), BLOCK=block, num_warps=config.warps,
    )  # fmt: skip
    return out


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
