"""The operators `lesa::*`: one set of schemas over Triton, csrc and eager PyTorch.

    ops.mix(ring, slots, table, step, out)          # or torch.ops.lesa.mix_out(...)
    forecast = ops.mix(ring, slots, table, step)    # differentiable in ring, table, latent, bias

Names, arguments and meaning are those of the launchers in `lesa_kernels`; `backend.active` tells
which implementation runs, and one that cannot take an argument (fp64, a long history, bands) leaves
it to eager PyTorch. All are opaque to torch.compile, without graph breaks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lesa.ops import operators as operators
from lesa.ops.dispatch import implementation

if TYPE_CHECKING:
    from lesa_kernels.gate import Gate

__all__ = ["gram", "implementation", "mix", "mix_modulate", "spline_mix"]


def mix(
    ring: Tensor,
    slots: Tensor,
    table: Tensor,
    step: Tensor,
    out: Tensor | None = None,
    *,
    latent: Tensor | None = None,
    bias: Tensor | None = None,
    band_size: int | None = None,
) -> Tensor:
    """out = sum_k table[s, k] * ring[slots[k]] (+ table[s, K] * latent) (+ bias[s]).

    See `lesa_kernels.mix.mix`. Without `out` the result is a new tensor through which gradients
    flow to ring, table, latent and bias.
    """
    if out is None:
        return torch.ops.lesa.mix(ring, slots, table, step, latent, bias, band_size)
    torch.ops.lesa.mix_out(ring, slots, table, step, out, latent, bias, band_size)
    return out


def spline_mix(
    ring: Tensor,
    slots: Tensor,
    weights: Tensor,
    tau: Tensor,
    gate: Gate,
    step: Tensor,
    out: Tensor | None = None,
    *,
    experts: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """out = h + gate(tau[s]) * (sum_k weights[s, k] * ring[slots[k]] + bias[s]), h the newest.

    See `lesa_kernels.spline_mix.spline_mix`.
    """
    *parameters, low, high = gate
    args = (ring, slots, weights, tau, *parameters, low, high, step)
    if out is None:
        return torch.ops.lesa.spline_mix(*args, experts, bias)
    torch.ops.lesa.spline_mix_out(*args, out, experts, bias)
    return out


def mix_modulate(
    ring: Tensor,
    slots: Tensor,
    table: Tensor,
    step: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    feature: Tensor | None = None,
) -> Tensor:
    """out = layer_norm(h) * (1 + scale) + shift, h = sum_k table[s, k] * ring[slots[k]] (+ bias).

    See `lesa_kernels.mix_modulate.mix_modulate`. Without `out` the result is a new tensor.
    """
    arguments = (ring, slots, table, step, scale, shift)
    if out is None and feature is None:
        return torch.ops.lesa.mix_modulate(*arguments, bias, eps)
    out = torch.empty_like(ring[0]) if out is None else out
    if feature is None:
        torch.ops.lesa.mix_modulate_out(*arguments, out, bias, eps)
    else:
        torch.ops.lesa.mix_modulate_and_feature_out(*arguments, out, feature, bias, eps)
    return out


def gram(
    feature: Tensor,
    ring: Tensor,
    slots: Tensor,
    out: Tensor | None = None,
    *,
    base: Tensor | None = None,
    samples: int = 1,
) -> Tensor:
    """out[p] = (sum f, <f, f>, <f, ring[slots[k]]> for each k (, <f, base>)) in float64.

    See `lesa_kernels.experimental.gram.gram`. Without `out` it is made with `samples` rows.
    """
    if out is None:
        return torch.ops.lesa.gram(feature, ring, slots, base, samples)
    torch.ops.lesa.gram_out(feature, ring, slots, out, base)
    return out
