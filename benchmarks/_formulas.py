"""The kernels as one would write them in PyTorch: contenders in eager mode and for torch.compile.

Features and slots are plain Python here, which the kernels do not know; sums are in fp32 like
theirs. `taylorseer` is the update of that method's release instead: see there.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import factorial

import torch
from lesa_kernels.gate import Gate
from torch import Tensor
from torch.nn import functional

from lesa.ops.eager import gate_value

Features = Sequence[Tensor]


def mix(features: Features, row: Tensor) -> Tensor:
    """sum_k row[k] * features[k], fp32."""
    total = features[0].float() * row[0]
    for feature, weight in zip(features[1:], row[1:], strict=True):
        total = torch.addcmul(total, feature.float(), weight)
    return total


def mix_modulate(features: Features, row: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """layer_norm(mix) * (1 + scale) + shift with scale and shift [B, C]."""
    mixed = mix(features, row)
    normed = functional.layer_norm(mixed, mixed.shape[-1:], eps=1e-6)
    return normed * (1 + scale.float())[:, None] + shift.float()[:, None]


def spline_mix(features: Features, row: Tensor, tau: Tensor, gate: Gate, bias: Tensor) -> Tensor:
    """features[0] + gate(tau) * (mix + bias) with the gate of one expert (E = 1)."""
    alpha = gate_value(tau, *(part[0] for part in gate[:4]), gate.low, gate.high)
    return features[0].float() + alpha * (mix(features, row) + bias)


def gram(feature: Tensor, others: Features) -> Tensor:
    """[1, K + 2]: the sum of a feature, and its products with itself and the others; fp32."""
    f = feature.float().flatten()
    products = [torch.dot(f, other.float().flatten()) for other in (feature, *others)]
    return torch.stack([f.sum(), *products])[None]


def push_fp8(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in e4m3 and one scale per token."""
    tokens = feature.float().flatten(0, -2)
    scale = tokens.abs().amax(1).clamp(min=1e-30) / 448
    return (tokens / scale[:, None]).to(torch.float8_e4m3fn).view(feature.shape), scale


def mix_fp8(codes: Features, scales: Features, row: Tensor) -> Tensor:
    """`mix` of features that `push_fp8` wrote."""
    wide = [c.float() * s.view(*c.shape[:-1], 1) for c, s in zip(codes, scales, strict=True)]
    return mix(wide, row)


def taylorseer(factors: Features, distance: int) -> Tensor:
    """TaylorSeer's forecast as its release computes it: sum_i factors[i] * distance**i / i!.

    The factors are K separate tensors in the features' dtype, the weights Python floats, every
    term two temporaries in that dtype. The release does this in every block; this is one of them.
    """
    total = 0
    for order, factor in enumerate(factors):
        total = total + (1 / factorial(order)) * factor * distance**order
    return total
