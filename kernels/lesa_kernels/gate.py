"""The paper's ridge gate as plain tensors that a kernel can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Gate", "fold_times", "pack_gate"]


class Gate(NamedTuple):
    """alpha = sum_m a_m (base_m silu(z_m) + sum_g spline_gm B_g(z_m)), z_m = p_m . tau + q_m.

    One row per expert (stage), nodes last, a_m multiplied into `base` and `spline`; fp32.
    Source: LESA paper, eqs. 10-11.
    """

    projection: Tensor  # [E, T, M]
    shift: Tensor  # [E, M]
    base: Tensor  # [E, M]
    spline: Tensor  # [E, intervals + 3, M]
    low: float
    high: float


class Ridge(Protocol):
    """What `lesa.forecasters.kan.RidgeSpline` has."""

    @property
    def grid(self) -> tuple[float, float]: ...

    @property
    def projection(self) -> Tensor: ...

    @property
    def shift(self) -> Tensor: ...

    @property
    def base(self) -> Tensor: ...

    @property
    def spline(self) -> Tensor: ...

    @property
    def output(self) -> Tensor: ...


def pack_gate(ridges: Sequence[Ridge]) -> Gate:
    """The gates of all stages, stacked; they must agree in nodes, inputs, intervals and grid."""
    output = torch.stack([ridge.output.detach().double() for ridge in ridges])  # [E, M]

    def stack(name: str) -> Tensor:
        return torch.stack([getattr(ridge, name).detach().double() for ridge in ridges])

    return Gate(
        stack("projection").mT.float().contiguous(),
        stack("shift").float(),
        (stack("base") * output).float(),
        (stack("spline") * output[..., None]).mT.float().contiguous(),
        *ridges[0].grid,
    )


def fold_times(gate: Gate, times: Tensor) -> Gate:
    """The same gate for one schedule, as a function of t_s alone.

    p . tau + q with tau_i = t_s - t_i is t_s * sum_i p_i + (q - sum_i p_i t_i): one input instead
    of T, so a program reads a few KB of parameters. Its tau is `times[:-1, None]`.
    """
    projection = gate.projection.double()
    offset = (projection * times.double()[:, None].to(projection.device)).sum(1)
    return gate._replace(
        projection=projection.sum(1, keepdim=True).float(),
        shift=(gate.shift.double() - offset).float(),
    )
