"""The paper's predictor in one pass over memory: gate, temporal projection and residual update."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lesa_kernels.checks import check_bias, check_gate, check_mix, check_table
from lesa_kernels.config import Config, lookup, programs
from lesa_kernels.device import bounds, read, slot_bases, weigh
from lesa_kernels.gate import Gate

__all__ = ["spline_mix"]

CHUNK = 16  # inputs of the gate read at a time: 32 registers at 256 nodes and 4 warps


@triton.jit
def _ridge(
    projection, shift, base, spline, tau, inputs, nodes, low, high,
    INTERVALS: tl.constexpr, NODES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gate's value at tau [inputs]; B-splines in closed form, four of them active."""
    node = tl.arange(0, NODES)
    known = node < nodes
    z = tl.load(shift + node, known, other=0.0)
    for first in range(0, inputs, CHUNK):
        i = first + tl.arange(0, CHUNK)
        time = tl.load(tau + i, i < inputs, other=0.0)
        tile = projection + i[:, None] * nodes + node[None, :]
        p = tl.load(tile, (i < inputs)[:, None] & known[None, :], other=0.0)
        z += tl.sum(p * time[:, None], axis=0)
    place = (tl.minimum(tl.maximum(z, low), high) - low) * (INTERVALS / (high - low))
    index = tl.minimum(place.to(tl.int32), INTERVALS - 1)
    u = place - index.to(tl.float32)
    v = 1 - u
    active = spline + index * nodes + node
    phi = v * v * v * tl.load(active, known, other=0.0)
    phi += (3 * u * u * (u - 2) + 4) * tl.load(active + nodes, known, other=0.0)
    phi += (3 * v * v * (v - 2) + 4) * tl.load(active + 2 * nodes, known, other=0.0)
    phi += u * u * u * tl.load(active + 3 * nodes, known, other=0.0)
    smooth = tl.load(base + node, known, other=0.0) * z * tl.sigmoid(z)
    return tl.sum(phi / 6 + smooth, axis=0)


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["slots", "step"])
def _kernel(
    out, ring, slots, weights, tau, projection, shift, base, spline, step, experts, bias,
    size, blocks, inputs, nodes, low, high,
    K: tl.constexpr, INTERVALS: tl.constexpr, NODES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.load(step).to(tl.int64)
    expert = s * 0
    if experts is not None:
        expert = tl.load(experts + s).to(tl.int64)
    bases = slot_bases(slots, size, K)
    w = read(weights + s * K, K)
    limits = bounds(w, size, K)
    b = 0.0
    if bias is not None:
        b = tl.load(bias + s)
    alpha = _ridge(
        projection + expert * inputs * nodes, shift + expert * nodes, base + expert * nodes,
        spline + expert * (INTERVALS + 3) * nodes, tau + s * inputs, inputs, nodes, low, high,
        INTERVALS, NODES, CHUNK,
    )  # fmt: skip
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        place = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        newest = tl.load(ring + bases[0] + place, place < size, other=0.0).to(tl.float32)
        z = tl.fma(w[0], newest, b)
        z += weigh(ring, bases[1:], w[1:], limits[1:], place, place, K - 1)
        total = tl.fma(alpha, z, newest)
        tl.store(out + place, total.to(out.dtype.element_ty), place < size)


def spline_mix(
    ring: Tensor,
    slots: Tensor,
    weights: Tensor,
    tau: Tensor,
    gate: Gate,
    step: Tensor,
    out: Tensor,
    *,
    experts: Tensor | None = None,
    bias: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """out = h + alpha * (sum_k weights[s, k] * ring[slots[k]] + bias[s]), h = ring[slots[0]].

    alpha = gate(tau[s]) of expert experts[s], computed once per program of a persistent grid. Fewer
    parameters are read with `fold_times`. `out` may be one of the ring's slots.
    Source: LESA (arXiv 2602.20497), eqs. 4-7, 10-11.

    Args:
        ring, slots, step, out: as in `mix`.
        weights: fp32 [S, K], the temporal projection.
        tau: fp32 [S, T], the gate's inputs at each step.
        gate: parameters of E experts, see `Gate`.
        experts: int32 [S]; without them expert 0 serves all steps.
        bias: fp32 [S].

    Raises:
        LesaError: a wrong shape, dtype, device or layout, or `out` that overlaps two slots.
    """
    history = check_mix(ring, slots, step, out)
    check_table(weights, history, out, band_size=1)
    check_bias(bias, weights, 1)
    inputs, nodes = check_gate(gate, tau, weights, experts)
    size = out.numel()
    if size == 0:
        return out
    config = config or lookup("spline_mix", out, history)
    blocks = triton.cdiv(size, config.block)
    _kernel[(programs(out.device, config, blocks),)](
        out, ring, slots, weights, tau, gate.projection, gate.shift, gate.base, gate.spline, step,
        experts, bias, size, blocks, inputs, nodes, gate.low, gate.high,
        K=history, INTERVALS=gate.spline.shape[1] - 3, NODES=triton.next_power_of_2(nodes),
        CHUNK=CHUNK, BLOCK=config.block, num_warps=config.warps,
    )  # fmt: skip
    return out
