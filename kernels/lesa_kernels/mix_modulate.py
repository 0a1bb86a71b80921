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
from lesa_kernels.launch import GRID_Y, Launch, Prepared

__all__ = ["mix_modulate", "prepare_mix_modulate"]


@triton.jit
def _merged(count_a, mean_a, square_a, count_b, mean_b, square_b):
    """Count, mean and sum of squared distances of two sets, one of which may be empty."""
    count, difference = count_a + count_b, mean_b - mean_a
    share = count_b / tl.maximum(count, 1.0)
    square = square_a + square_b + difference * difference * count_a * share
    return count, tl.fma(difference, share, mean_a), square


@triton.jit
def _moments(parts, columns, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Mean and variance of a row, in one reduction and exact for large means.

    Each lane of the block has a count, a mean and a sum of squared distances from it over its
    chunks; these are merged.
    """
    count = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        known = chunk * BLOCK + tl.arange(0, BLOCK) < columns
        count += 1.0 if EVEN else tl.where(known, 1.0, 0.0)
        total += parts[chunk]
    mean = total / tl.maximum(count, 1.0)
    square = tl.zeros([BLOCK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        distance = parts[chunk] - mean
        if not EVEN:
            known = chunk * BLOCK + tl.arange(0, BLOCK) < columns
            distance = tl.where(known, distance, 0.0)
        square = tl.fma(distance, distance, square)
    count, mean, square = tl.reduce((count, mean, square), 0, _merged)
    return mean, square / columns


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["slots", "step"])
def _kernel(
    out, feature, ring, slots, table, step, scale, shift, bias,
    size, rows, columns, samples, step_stride, sample_stride, eps,
    K: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    s = tl.load(step).to(tl.int64)
    bases = slot_bases(slots, size, K)
    weights = read(table + s * K, K)
    b = 0.0
    if bias is not None:
        b = tl.load(bias + s)
    for sample in range(tl.program_id(1), samples, tl.num_programs(1)):
        sample = tl.cast(sample, tl.int64)
        modulation = s * step_stride + sample * sample_stride
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            start = (sample * rows + row) * columns
            features = ()
            for chunk in tl.static_range(CHUNKS):
                column = chunk * BLOCK + tl.arange(0, BLOCK)
                features += (fetch(ring, bases, weights, start, column, columns, 0, K, False),)
            parts = ()
            for chunk in tl.static_range(CHUNKS):
                column = chunk * BLOCK + tl.arange(0, BLOCK)
                part = tl.zeros([BLOCK], tl.float32) + b
                part = weigh(part, features[chunk], weights, 0, K, False)
                if not EVEN:
                    part = tl.where(column < columns, part, 0.0)
                parts += (part,)
            mean, variance = _moments(parts, columns, CHUNKS, BLOCK, EVEN)
            inverse = tl.rsqrt(variance + eps)
            for chunk in tl.static_range(CHUNKS):
                column = chunk * BLOCK + tl.arange(0, BLOCK)
                inside = column < columns
                place = modulation + column
                gain = tl.load(scale + place, inside, other=0.0).to(tl.float32) + 1
                offset = tl.load(shift + place, inside, other=0.0).to(tl.float32)
                if feature is not None:
                    kept = parts[chunk].to(feature.dtype.element_ty)
                    tl.store(feature + start + column, kept, inside)
                value = tl.fma((parts[chunk] - mean) * inverse, gain, offset)
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
    samples, columns = out.shape[0], out.shape[-1]
    rows = size // (samples * columns)
    block = min(config.block, triton.next_power_of_2(columns))
    most = programs(out.device, config, rows * samples)
    arguments = (
        out, feature, ring, slots, table, step, scale, shift, bias, size, rows, columns, samples,
        scale.stride(0) if scale.ndim == 3 else 0, scale.stride(-2), eps,
    )  # fmt: skip
    constants = {"K": history, "CHUNKS": triton.cdiv(columns, block), "BLOCK": block}
    constants["EVEN"] = columns % block == 0
    grid = triton.cdiv(most, samples), min(samples, GRID_Y)
    return Launch(_kernel, grid, out.device, config.warps, arguments, constants)


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
