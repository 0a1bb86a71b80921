"""The one operation of a skipped step: a weighted sum of cached features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["active_backend", "mix"]


def active_backend() -> str:
    """Name of the implementation that `mix` runs."""
    return "eager"


def mix(
    ring: Tensor | Sequence[Tensor],
    slots: Sequence[int],
    coefficients: Sequence[float],
    out: Tensor,
    latent: Tensor | None = None,
    latent_coefficient: float = 0.0,
    bias: float = 0.0,
) -> Tensor:
    """`out = sum_k coefficients[k] * ring[slots[k]] + latent_coefficient * latent + bias`.

    Accumulates in fp32 (fp64 if `out` is fp64) and rounds once, at the store. Slots with a zero
    coefficient are not read. `out` may be one of the ring's slots.

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
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    in_place = out.dtype == wide and not _overlaps(out, ring[0])
    total = _accumulate(terms, out if in_place else torch.empty_like(out, dtype=wide))
    if bias != 0.0:
        total.add_(bias)
    return total if total is out else out.copy_(total)


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
