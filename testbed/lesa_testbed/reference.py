"""The kernels in float64 eager PyTorch: what tests and benchmarks measure them against.

Same names and arguments as the launchers. Everything is computed in float64 and rounded once, into
`out`; pass a float64 `out` to see the unrounded result. `config` is taken and ignored.
"""

from __future__ import annotations

from typing import Any

import torch
from lesa_kernels.gate import Gate
from torch import Tensor
from torch.nn import functional

__all__ = [
    "gram",
    "mix",
    "mix_differentiable",
    "mix_fp8",
    "mix_grad_features",
    "mix_grad_table",
    "mix_modulate",
    "push_fp8",
    "spline_gate",
    "spline_mix",
]


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
    config: Any = None,
) -> Tensor:
    """See `lesa_kernels.mix.mix`."""
    found = mix_differentiable(
        ring, slots, table, step, latent=latent, bias=bias, band_size=band_size
    )
    return out.copy_(found)


def mix_differentiable(
    ring: Tensor,
    slots: Tensor,
    table: Tensor,
    step: Tensor,
    *,
    latent: Tensor | None = None,
    bias: Tensor | None = None,
    band_size: int | None = None,
) -> Tensor:
    """See `lesa.ops.mix`; float64, differentiable."""
    s, shape = int(step), ring.shape[1:]
    rows = table[s].double()  # [K'] or [K', G]
    bands = rows.shape[1] if rows.ndim == 2 else 1
    band_size = band_size or max(1, shape[-1] // bands)

    def spread(row: Tensor) -> Tensor:  # [G] -> a feature's shape
        row = row.reshape(1, bands, 1).expand(-1, -1, band_size)
        return row.reshape(-1).repeat(shape.numel() // (bands * band_size)).view(shape)

    features = [ring[i] for i in slots.tolist()] + ([] if latent is None else [latent])
    total = torch.zeros(shape, dtype=torch.float64, device=ring.device)
    for row, feature in zip(rows, features, strict=True):
        weight = spread(row)
        unread = (weight == 0) & ~feature.isfinite()
        total = total + torch.where(unread, 0.0, feature.double()) * weight
    return total if bias is None else total + spread(bias[s].double())


def spline_gate(tau: Tensor, gate: Gate, expert: int = 0) -> Tensor:
    """alpha at tau [T] in float64, by the Cox-de Boor recursion on uniform knots."""
    p, q, base, spline = (tensor[expert].double() for tensor in gate[:4])
    z = tau.double() @ p + q  # [M]
    intervals = len(spline) - 3
    width = (gate.high - gate.low) / intervals
    knots = gate.low + width * (torch.arange(intervals + 7, device=z.device).double() - 3)
    x = z.clamp(gate.low, gate.high - 1e-12)[:, None]  # the last interval is open
    basis = ((knots[:-1] <= x) & (x < knots[1:])).double()
    for degree in (1, 2, 3):
        up = (x - knots[: -degree - 1]) / (degree * width)
        down = (knots[degree + 1 :] - x) / (degree * width)
        basis = up * basis[:, :-1] + down * basis[:, 1:]
    return ((basis * spline.mT).sum(1) + base * functional.silu(z)).sum()


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
    config: Any = None,
) -> Tensor:
    """See `lesa_kernels.spline_mix.spline_mix`."""
    s = int(step)
    alpha = spline_gate(tau[s], gate, 0 if experts is None else int(experts[s]))
    z = mix_differentiable(ring, slots, weights, step, bias=bias)
    return out.copy_(ring[int(slots[0])].double() + alpha * z)


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
    config: Any = None,
) -> Tensor:
    """See `lesa_kernels.mix_modulate.mix_modulate`."""
    mixed = mix_differentiable(ring, slots, table, step, bias=bias)
    if feature is not None:
        feature.copy_(mixed)
    scale, shift = (x[int(step)] if x.ndim == 3 else x for x in (scale, shift))  # [B, C]
    between = (len(scale), *[1] * (mixed.ndim - 2), mixed.shape[-1])
    normed = functional.layer_norm(mixed, mixed.shape[-1:], eps=eps)
    return out.copy_(normed * (1 + scale.double().view(between)) + shift.double().view(between))


def gram(
    feature: Tensor,
    ring: Tensor,
    slots: Tensor,
    out: Tensor,
    *,
    base: Tensor | None = None,
    config: Any = None,
) -> Tensor:
    """See `lesa_kernels.experimental.gram.gram`."""
    others = [torch.ones_like(feature), feature, *(ring[i] for i in slots.tolist())]
    others += [] if base is None else [base]
    rows = [(feature.double() * other.double()).view(len(out), -1).sum(1) for other in others]
    return out.copy_(torch.stack(rows, dim=1))


def mix_grad_table(
    grad: Tensor,
    ring: Tensor,
    slots: Tensor,
    *,
    latent: Tensor | None = None,
    bands: int = 1,
    band_size: int | None = None,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """See `lesa_kernels.experimental.mix_backward.mix_grad_table`."""
    band_size = band_size or max(1, grad.shape[-1] // bands)
    others = [torch.ones_like(grad), *(ring[i] for i in slots.tolist())]
    others += [] if latent is None else [latent]
    found = [(grad.double() * x.double()).view(-1, bands, band_size).sum((0, 2)) for x in others]
    return torch.stack(found[1:]), found[0]


def mix_grad_features(
    grad: Tensor,
    slots: Tensor,
    table: Tensor,
    step: Tensor,
    ring_grad: Tensor,
    *,
    latent_grad: Tensor | None = None,
    band_size: int | None = None,
    config: Any = None,
) -> Tensor:
    """See `lesa_kernels.experimental.mix_backward.mix_grad_features`."""
    rows = table[int(step)].double().view(table.shape[1], -1)  # [K', G]
    bands = rows.shape[1]
    cut = grad.double().view(-1, bands, band_size or max(1, grad.shape[-1] // bands))
    targets = [ring_grad[i] for i in slots.tolist()]
    targets += [] if latent_grad is None else [latent_grad]
    for row, target in zip(rows, targets, strict=True):
        target.copy_((cut * row[:, None]).view(grad.shape))
    return ring_grad


def push_fp8(
    feature: Tensor, ring: Tensor, scales: Tensor, slot: Tensor, *, config: Any = None
) -> None:
    """See `lesa_kernels.experimental.fp8.push_fp8`; rounds fp32 quotients, as the kernel does."""
    tokens = feature.float().flatten(0, -2)
    scale = tokens.abs().amax(1).clamp(min=1e-30) / 448
    scales[int(slot)] = scale
    ring[int(slot)] = (tokens / scale[:, None]).to(ring.dtype).view(feature.shape)


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
    config: Any = None,
) -> Tensor:
    """See `lesa_kernels.experimental.fp8.mix_fp8`."""
    wide = ring.double() * scales.double().view(*ring.shape[:-1], 1)
    return mix(wide, slots, table, step, out, latent=latent, bias=bias)
