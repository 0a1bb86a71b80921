"""The kernels in plain PyTorch: what runs where no faster backend does.

Same names and arguments as the launchers in `lesa_kernels`, on any device and in any floating
dtype. Sums are fp32 (fp64 for fp64 features) and rounded once, at the store. On the CPU the step
and the slots are read; elsewhere nothing is, so that no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from lesa_kernels.gate import Gate

__all__ = ["gate_value", "gram", "mix", "mix_backward", "mix_modulate", "mix_row", "spline_mix"]


def mix_row(
    ring: Tensor | Sequence[Tensor],
    slots: Sequence[int],
    coefficients: Sequence[float],
    out: Tensor,
    latent: Tensor | None = None,
    latent_coefficient: float = 0.0,
    bias: float = 0.0,
) -> Tensor:
    """`out = sum_k coefficients[k] * ring[slots[k]] + latent_coefficient * latent + bias`.

    The mix of one step whose numbers the host knows. Slots with a zero coefficient are not read.
    `out` may be one of the ring's slots.

    Args:
        ring: features [K, ...], or the K features themselves.
        slots: slot of each coefficient's feature, newest first.
        coefficients: one float per slot.
        out: tensor of a feature's shape, overwritten and returned.
        latent: tensor of a feature's shape, of any floating dtype.
    """
    terms = [(ring[i], c) for i, c in zip(slots, coefficients, strict=False) if c != 0.0]
    if latent is not None and latent_coefficient != 0.0:
        terms.append((latent, latent_coefficient))
    wide = _wide(out.dtype)
    in_place = out.dtype == wide and not _overlaps(out, ring[0])
    total = _accumulate(terms, out if in_place else torch.empty_like(out, dtype=wide))
    if bias != 0.0:
        total.add_(bias)
    return total if total is out else out.copy_(total)


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
) -> Tensor:
    """See `lesa_kernels.mix.mix`."""
    if table.ndim == 2 and table.device.type == "cpu":
        history, row = len(slots), table[int(step)].tolist()
        shift = 0.0 if bias is None else float(bias.view(-1)[int(step)])
        own = 0.0 if latent is None else row[history]
        return mix_row(ring, slots.tolist(), row[:history], out, latent, own, shift)
    return out.copy_(_mixed(ring, slots, table, step, latent, bias, band_size))


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
) -> Tensor:
    """See `lesa_kernels.spline_mix.spline_mix`."""
    at = step.view(1).long()
    expert = torch.zeros_like(at) if experts is None else experts.index_select(0, at).long()
    projection, shift, base, spline = (x.index_select(0, expert)[0] for x in gate[:4])
    row = tau.index_select(0, at)[0]
    alpha = gate_value(row, projection, shift, base, spline, gate.low, gate.high)
    residual = _mixed(ring, slots, weights, step, None, bias, None)
    newest = _features(ring, slots)[0].to(residual.dtype)
    return out.copy_(newest + alpha * residual)


def gate_value(
    tau: Tensor,
    projection: Tensor,
    shift: Tensor,
    base: Tensor,
    spline: Tensor,
    low: float,
    high: float,
) -> Tensor:
    """alpha at tau [T] of one expert's ridge gate (see `lesa_kernels.gate.Gate`), a scalar."""
    z = tau @ projection + shift  # [M]
    intervals = len(spline) - 3
    place = (z.clamp(low, high) - low) * (intervals / (high - low))
    index = place.long().clamp(max=intervals - 1)
    u = place - index
    v = 1 - u
    basis = torch.stack(  # the four cubic B-splines that are not zero there
        [v**3, 3 * u * u * (u - 2) + 4, 3 * v * v * (v - 2) + 4, u**3]
    )
    active = spline.gather(0, index + torch.arange(4, device=z.device)[:, None])
    return ((basis * active).sum(0) / 6 + base * functional.silu(z)).sum()


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
) -> Tensor:
    """See `lesa_kernels.mix_modulate.mix_modulate`."""
    mixed = _mixed(ring, slots, table, step, None, bias, None)
    if feature is not None:
        feature.copy_(mixed)
    if scale.ndim == 3:
        scale, shift = (x.index_select(0, step.view(1).long())[0] for x in (scale, shift))
    between = (len(scale), *[1] * (mixed.ndim - 2), mixed.shape[-1])
    gain, shift = (x.to(mixed.dtype).view(between) for x in (scale, shift))
    normed = functional.layer_norm(mixed, mixed.shape[-1:], eps=eps)
    return out.copy_(torch.addcmul(shift, normed, 1 + gain))


def gram(
    feature: Tensor, ring: Tensor, slots: Tensor, out: Tensor, *, base: Tensor | None = None
) -> Tensor:
    """See `lesa_kernels.experimental.gram.gram`; every product is summed in float64."""
    f = feature.double().view(len(out), -1)
    others = [f, *(x.double().view(f.shape) for x in _features(ring, slots))]
    if base is not None:
        others.append(base.double().view(f.shape))
    return out.copy_(torch.stack([f.sum(1), *((f * x).sum(1) for x in others)], dim=1))


def mix_backward(
    grad: Tensor,
    ring: Tensor,
    slots: Tensor,
    table: Tensor,
    step: Tensor,
    latent: Tensor | None,
    band_size: int | None,
    features: bool,
    rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ring, latent, table and bias (see `lesa.ops`); empty where not asked for."""
    wide, at = _wide(grad.dtype), step.view(1).long()
    row = table.index_select(0, at)[0].to(wide)  # [K'] or [K', G]
    bands = row.shape[1] if row.ndim == 2 else 1
    cut = grad.to(wide).view(-1, bands, _band_size(grad, bands, band_size))
    ring_grad, latent_grad, table_grad, bias_grad = (grad.new_empty(0) for _ in range(4))
    if features:
        parts = [(cut * weight.view(bands, 1)).view_as(grad) for weight in row]
        ring_grad = torch.zeros_like(ring)
        stacked = torch.stack(parts[: len(slots)]).to(ring.dtype)
        ring_grad.index_copy_(0, slots.long(), stacked)
        if latent is not None:
            latent_grad = parts[-1].to(latent.dtype)
    if rows:
        others = [*_features(ring, slots), *([] if latent is None else [latent])]
        products = [(cut.double() * x.double().view_as(cut)).sum((0, 2)) for x in others]
        found = torch.stack(products).view(1, *table.shape[1:]).to(table.dtype)
        table_grad = torch.zeros_like(table).index_copy_(0, at, found)
        total = cut.double().sum((0, 2)).to(table.dtype)
        total = total.view(1, *([bands] if table.ndim == 3 else []))
        bias_grad = table.new_zeros(len(table), *total.shape[1:]).index_copy_(0, at, total)
    return ring_grad, latent_grad, table_grad, bias_grad


def _mixed(
    ring: Tensor,
    slots: Tensor,
    table: Tensor,
    step: Tensor,
    latent: Tensor | None,
    bias: Tensor | None,
    band_size: int | None,
) -> Tensor:
    """The unrounded sum; what has weight 0 does not enter, NaN or not."""
    wide, at = _wide(ring.dtype), step.view(1).long()
    row = table.index_select(0, at)[0].to(wide)
    bands = row.shape[1] if row.ndim == 2 else 1
    shape = ring.shape[1:]
    cut = (-1, bands, _band_size(ring[0], bands, band_size))
    total = torch.zeros(shape, dtype=wide, device=ring.device).view(cut)
    others = [*_features(ring, slots), *([] if latent is None else [latent])]
    for weight, feature in zip(row.view(len(row), bands, 1), others, strict=True):
        x = torch.where(weight != 0, feature.reshape(cut).to(wide), 0.0)
        total = torch.addcmul(total, x, weight)
    if bias is not None:
        total = total + bias.index_select(0, at).to(wide).view(bands, 1)
    return total.view(shape)


def _features(ring: Tensor, slots: Tensor) -> Sequence[Tensor]:
    if slots.device.type == "cpu":
        return [ring[i] for i in slots.tolist()]
    return ring.index_select(0, slots).unbind(0)


def _band_size(feature: Tensor, bands: int, band_size: int | None) -> int:
    if bands == 1:
        return feature.numel()
    return band_size or feature.shape[-1] // bands


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _accumulate(terms: list[tuple[Tensor, float]], total: Tensor) -> Tensor:
    if not terms:
        return total.zero_()
    first, coefficient = terms[0]
    if first.dtype == total.dtype:
        torch.mul(first, coefficient, out=total)
    else:  # mul with out= would round to the narrow dtype before it widens
        total.copy_(first).mul_(coefficient)
    for feature, coefficient in terms[1:]:
        total.add_(feature, alpha=coefficient)
    return total


def _overlaps(out: Tensor, slot: Tensor) -> bool:
    return out.untyped_storage().data_ptr() == slot.untyped_storage().data_ptr()
