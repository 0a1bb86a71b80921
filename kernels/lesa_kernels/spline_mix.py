"""The paper's predictor in one pass over memory: gate, temporal projection and residual update."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lesa_kernels.checks import check_bias, check_gate, check_mix, check_rows
from lesa_kernels.config import Config, lookup, programs
from lesa_kernels.device import fetch, read, slot_bases, tail, weigh
from lesa_kernels.gate import Gate
from lesa_kernels.launch import Launch, Prepared

__all__ = ["prepare_spline_mix", "spline_mix"]

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


@triton.jit
def _fetch_tile(ring, bases, weights, size, begin, K: tl.constexpr, BLOCK: tl.constexpr):
    """The newest feature's part of a tile, which is always read, and those of the others."""
    lane, count = tl.arange(0, BLOCK), tail(size, begin, BLOCK)
    newest = tl.load(ring + (bases[0] + begin) + lane, lane < count, other=0.0)
    return newest, fetch(ring, bases, weights, begin, lane, count, 1, K, False)


@triton.jit
def _write_tile(
    out, newest, older, weights, added, alpha, size, begin, K: tl.constexpr, BLOCK: tl.constexpr
):
    lane = tl.arange(0, BLOCK)
    h = newest.to(tl.float32)
    z = weigh(tl.fma(weights[0], h, added), older, weights, 1, K, False)
    total = tl.fma(alpha, z, h)
    inside = lane < tail(size, begin, BLOCK)
    tl.store(out + begin + lane, total.to(out.dtype.element_ty), inside)


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
    added = 0.0
    if bias is not None:
        added = tl.load(bias + s)
    first = tl.program_id(0)
    begin = first.to(tl.int64) * BLOCK
    newest, older = _fetch_tile(ring, bases, w, size, begin, K, BLOCK)  # meanwhile, the gate
    alpha = _ridge(
        projection + expert * inputs * nodes, shift + expert * nodes, base + expert * nodes,
        spline + expert * (INTERVALS + 3) * nodes, tau + s * inputs, inputs, nodes, low, high,
        INTERVALS, NODES, CHUNK,
    )  # fmt: skip
    _write_tile(out, newest, older, w, added, alpha, size, begin, K, BLOCK)
    for block in range(first + tl.num_programs(0), blocks, tl.num_programs(0)):
        begin = tl.cast(block, tl.int64) * BLOCK
        newest, older = _fetch_tile(ring, bases, w, size, begin, K, BLOCK)
        _write_tile(out, newest, older, w, added, alpha, size, begin, K, BLOCK)


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
    launch = _plan(ring, slots, weights, tau, gate, step, out, experts, bias, config)
    if launch is not None:
        launch.run()
    return out


def prepare_spline_mix(
    ring: Tensor,
    weights: Tensor,
    tau: Tensor,
    gate: Gate,
    *,
    experts: Tensor | None = None,
    bias: Tensor | None = None,
    config: Config | None = None,
) -> Prepared:
    """`spline_mix` for many steps: call it with (slots, step, out)."""

    def plan(slots: Tensor, step: Tensor, out: Tensor) -> Launch | None:
        return _plan(ring, slots, weights, tau, gate, step, out, experts, bias, config)

    return Prepared(plan, ring, ("slots", "step", "out"))


def _plan(
    ring: Tensor, slots: Tensor, weights: Tensor, tau: Tensor, gate: Gate, step: Tensor,
    out: Tensor, experts: Tensor | None, bias: Tensor | None, config: Config | None,
) -> Launch | None:  # fmt: skip
    """Checked; None for an empty feature."""
    history = check_mix(ring, slots, step, out)
    check_rows(weights, history, out, "weights")
    check_bias(bias, weights, 1)
    inputs, nodes = check_gate(gate, tau, weights, experts)
    size = out.numel()
    if size == 0:
        return None
    config = config or lookup("spline_mix", out, history)
    blocks = triton.cdiv(size, config.block)
    arguments = (
        out, ring, slots, weights, tau, gate.projection, gate.shift, gate.base, gate.spline, step,
        experts, bias, size, blocks, inputs, nodes, gate.low, gate.high,
    )  # fmt: skip
    constants = {
        "K": history,
        "INTERVALS": gate.spline.shape[1] - 3,
        "NODES": triton.next_power_of_2(nodes),
        "CHUNK": min(CHUNK, triton.next_power_of_2(inputs)),
        "BLOCK": config.block,
    }
    grid = (programs(out.device, config, blocks),)
    return Launch(_kernel, grid, out.device, config.warps, arguments, constants)
