"""Gradients of `mix` with respect to coefficients, bias, features and latent."""

# mypy: disable-error-code="assignment, misc"
# Kernels grow tuples in unrolled loops.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lesa_kernels.checks import (
    check_features,
    check_step,
    check_table,
    like,
    split_bands,
)
from lesa_kernels.config import Config, lookup, programs
from lesa_kernels.device import fetch, slot_bases, tail
from lesa_kernels.experimental.gram import gram
from lesa_kernels.launch import Launch

__all__ = ["mix_gradients", "mix_grad_features", "mix_grad_table"]

WIDE_BAND = 512  # elements from which a band is summed by `gram`, not column by column


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["slots"])
def _table_kernel(
    partials, grad, ring, slots, latent, size, rows, columns, K: tl.constexpr, BLOCK: tl.constexpr
):
    COUNT: tl.constexpr = K + 1 + (latent is not None)
    lane = tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    count = tail(columns, first, BLOCK)
    bases = slot_bases(slots, size, K)
    sums = ()
    for _ in tl.static_range(COUNT):
        sums += (tl.zeros([BLOCK], tl.float32),)
    for row in range(tl.program_id(1), rows, tl.num_programs(1)):
        begin = tl.cast(row, tl.int64) * columns + first
        g = tl.load(grad + begin + lane, lane < count, other=0.0)
        features = fetch(ring, bases, None, begin, lane, count, 0, K, True)
        if latent is not None:
            features += (tl.load(latent + begin + lane, lane < count, other=0.0),)
        g = g.to(tl.float32)
        found = (sums[0] + g,)
        for i in tl.static_range(COUNT - 1):
            found += (tl.fma(g, features[i].to(tl.float32), sums[1 + i]),)
        sums = found
    target = partials + tl.program_id(1).to(tl.int64) * COUNT * columns + first
    for i in tl.static_range(COUNT):
        tl.store(target + lane, sums[i], lane < count)
        target += columns


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["slots", "step"])
def _features_kernel(
    ring_grad, grad, slots, table, step, latent_grad,
    size, rows, columns, bands, band_size, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.load(step).to(tl.int64)
    WIDTH: tl.constexpr = K + (latent_grad is not None)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    band = column // band_size % bands
    bases = slot_bases(slots, size, K)
    weights = ()
    for k in tl.static_range(WIDTH):
        weights += (tl.load(table + (s * WIDTH + k) * bands + band, inside, other=0.0),)
    for row in range(tl.program_id(1), rows, tl.num_programs(1)):
        place = tl.cast(row, tl.int64) * columns + column
        known = inside & (place < size)
        g = tl.load(grad + place, known, other=0.0).to(tl.float32)
        for k in tl.static_range(K):
            value = (weights[k] * g).to(ring_grad.dtype.element_ty)
            tl.store(ring_grad + bases[k] + place, value, known)
        if latent_grad is not None:
            value = (weights[K] * g).to(latent_grad.dtype.element_ty)
            tl.store(latent_grad + place, value, known)


def mix_grad_table(
    grad: Tensor,
    ring: Tensor,
    slots: Tensor,
    *,
    latent: Tensor | None = None,
    bands: int = 1,
    band_size: int | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of table[s] (sums of grad * ring[slots[k]], latent last) and of bias[s] (of grad).

    Returns float64 [K (+ 1), G] and [G]. fp32 partials per program, added in a fixed order.

    Args:
        grad: the gradient of `out`, of a feature's shape.
        ring, slots, latent, band_size: as in `mix`; bands is G.

    Raises:
        LesaError: a wrong shape, dtype, device or layout.
    """
    history = check_features(grad, ring, slots, "grad")
    if latent is not None:
        like("latent", latent, grad)
    bands, band_size = split_bands(bands, band_size, grad)
    size, columns = grad.numel(), bands * band_size
    count = history + 1 + (latent is not None)
    if size == 0:
        found = grad.new_zeros(count, bands, dtype=torch.float64)
    elif bands == 1 or band_size >= WIDE_BAND:
        samples = 1 if bands == 1 else size // band_size
        products = grad.new_empty(samples, count + 1, dtype=torch.float64)
        gram(grad, ring, slots, products, base=latent)
        products = products.view(-1, bands, count + 1).sum(0).mT  # [count + 1, G]
        found = torch.cat([products[:1], products[2:]])
    else:
        config = config or lookup("mix_backward", grad, history)
        rows, blocks = size // columns, triton.cdiv(columns, config.block)
        splits = triton.cdiv(programs(grad.device, config, rows * blocks), blocks)
        partials = grad.new_empty(splits, count, columns, dtype=torch.float32)
        arguments = (partials, grad, ring, slots, latent, size, rows, columns)
        constants = {"K": history, "BLOCK": config.block}
        grid = blocks, splits
        Launch(_table_kernel, grid, grad.device, config.warps, arguments, constants).run()
        found = partials.view(splits, count, bands, band_size).sum((0, 3), dtype=torch.float64)
    return found[1:], found[0]


def mix_grad_features(
    grad: Tensor,
    slots: Tensor,
    table: Tensor,
    step: Tensor,
    ring_grad: Tensor,
    *,
    latent_grad: Tensor | None = None,
    band_size: int | None = None,
    config: Config | None = None,
) -> Tensor:
    """ring_grad[slots[k]] = table[s, k] * grad; latent_grad = table[s, K] * grad.

    One read of `grad`, K (+ 1) writes; other slots of `ring_grad` are left as they are.
    `slots` must name each slot once.

    Args:
        grad: the gradient of `out`, of a feature's shape.
        slots, table, step, band_size: as in `mix`.
        ring_grad: [N, *grad.shape], written and returned.
        latent_grad: of a feature's shape; needed where the table has a latent's column.

    Raises:
        LesaError: a wrong shape, dtype, device or layout.
    """
    history = check_features(grad, ring_grad, slots, "grad")
    check_step(step, grad.device)
    if latent_grad is not None:
        like("latent_grad", latent_grad, grad)
    bands, band_size = check_table(table, history + (latent_grad is not None), grad, band_size)
    size = grad.numel()
    if size == 0:
        return ring_grad
    config = config or lookup("mix_backward", grad, history)
    columns = config.block if bands == 1 else bands * band_size
    rows, blocks = triton.cdiv(size, columns), triton.cdiv(columns, config.block)
    splits = triton.cdiv(programs(grad.device, config, rows * blocks), blocks)
    arguments = (
        ring_grad, grad, slots, table, step, latent_grad, size, rows, columns, bands, band_size
    )  # fmt: skip
    constants = {"K": history, "BLOCK": config.block}
    grid = blocks, splits
    Launch(_features_kernel, grid, grad.device, config.warps, arguments, constants).run()
    return ring_grad


def mix_gradients(
    grad: Tensor,
    ring: Tensor,
    slots: Tensor,
    table: Tensor,
    step: Tensor,
    latent: Tensor | None = None,
    band_size: int | None = None,
    features: bool = True,
    rows: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ring, latent, table and bias at `grad`, the gradient of mix's result.

    Those of ring and latent cost K (+ 1) writes and come with `features`, those of table and bias
    K (+ 1) reads with `rows`; the others are empty.
    """
    rings, latents, tables, biases = (grad.new_empty(0) for _ in range(4))
    if features:
        rings = torch.zeros_like(ring)
        given = None if latent is None else torch.empty_like(latent)
        mix_grad_features(grad, slots, table, step, rings, latent_grad=given, band_size=band_size)
        latents = latents if given is None else given
    if rows:
        bands = table.shape[2] if table.ndim == 3 else 1
        row, total = mix_grad_table(
            grad, ring, slots, latent=latent, bands=bands, band_size=band_size
        )
        tables = _at_step(table, step, row)
        biases = _at_step(table[:, 0], step, total)
    return rings, latents, tables, biases


def _at_step(like: Tensor, step: Tensor, row: Tensor) -> Tensor:
    """Zeros like the whole table, with one row at `step`; no synchronisation."""
    row = row.reshape(1, *like.shape[1:]).to(like.dtype)
    return torch.zeros_like(like).index_copy_(0, step.view(1).long(), row)
