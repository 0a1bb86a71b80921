"""Kolmogorov-Arnold layers on uniform cubic B-splines, always in fp32 or fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lesa.core.checks import whole
from lesa.errors import LesaError

Grid = tuple[float, float]
FULL_PRECISION = (torch.float32, torch.float64)


class FullPrecision(nn.Module):
    """A module that follows its parent's device but never leaves fp32 or fp64.

    `.to(torch.bfloat16)`, `.half()` and the like leave the parameters as they are: B-splines in
    bf16 lose 1.5 % of their partition of unity, and bf16 parameters lose small updates.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        parameter = next(self.parameters(), None)
        if parameter is not None:
            probe = fn(parameter.detach().new_empty(0))
            if probe.dtype not in FULL_PRECISION:
                return super()._apply(lambda tensor: tensor.to(probe.device), recurse)
        return super()._apply(fn, recurse)


def bspline_weights(x: Tensor, intervals: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """The four cubic B-splines that are not zero at x, in closed form.

    x [...] is clamped to the grid, where u in [0, 1] is its place within interval i. Returns the
    index i [...] of the first active spline and the weights [..., 4] of splines i..i+3:
    (1-u)^3 / 6, (3u^3 - 6u^2 + 4) / 6, (-3u^3 + 3u^2 + 3u + 1) / 6, u^3 / 6, which sum to 1.
    """
    low, high = grid
    place = (x.clamp(low, high) - low) * (intervals / (high - low))
    index = place.detach().floor().clamp(0, intervals - 1)
    u = place - index
    v = 1 - u
    weights = (
        v**3,
        3 * u**2 * (u - 2) + 4,
        3 * v**2 * (v - 2) + 4,  # the second one mirrored
        u**3,
    )
    return index.long(), torch.stack(weights, dim=-1) / 6


def bspline_basis(x: Tensor, intervals: int, grid: Grid) -> Tensor:
    """All intervals + 3 cubic B-splines at x [...]: [..., intervals + 3]."""
    index, weights = bspline_weights(x, intervals, grid)
    places = index[..., None] + torch.arange(4, device=x.device)
    return weights.new_zeros(*x.shape, intervals + 3).scatter(-1, places, weights)


def ending_basis(x: Tensor, intervals: int, grid: Grid) -> Tensor:
    """The same splines, each of which ends on its own knots: outside the grid they fall to 0.

    Those of a grid with 4 more intervals on each side, without the 4 outermost of each."""
    width = 4 * (grid[1] - grid[0]) / intervals
    wide = bspline_basis(x, intervals + 8, (grid[0] - width, grid[1] + width))
    return wide[..., 4:-4]


class EdgeSplineLayer(FullPrecision):
    """y_o = sum_i base[o, i] silu(x_i) + sum_g spline[o, i, g] B_g(x_i): one spline per edge.

    x [N, inputs] -> [N, outputs]. Outside the grid the splines hold their border value, or with
    `ending` fall to 0 as in the release; the SiLU branch goes on linearly. `zero` makes the layer
    return 0 at first.
    Source: LESA's release (efficient-kan form); Liu et al. 2024 (arXiv 2404.19756), eq. 2.10.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        intervals: int = 5,
        grid: Grid = (-3.0, 3.0),
        zero: bool = False,
        ending: bool = False,
    ) -> None:
        super().__init__()
        self.intervals, self.grid = check_grid(intervals, grid)
        self.basis = ending_basis if ending else bspline_basis
        base = torch.randn(outputs, inputs) / inputs**0.5
        spline = torch.randn(outputs, inputs, intervals + 3) * (0.1 / inputs**0.5)
        self.base = nn.Parameter(base * (not zero))
        self.spline = nn.Parameter(spline * (not zero))

    def forward(self, x: Tensor) -> Tensor:
        basis = self.basis(x, self.intervals, self.grid)  # [N, inputs, intervals + 3]
        smooth = functional.linear(functional.silu(x), self.base)
        return smooth + functional.linear(basis.flatten(-2), self.spline.flatten(-2))


class RidgeSpline(FullPrecision):
    """y = sum_m a_m phi_m(p_m . x + q_m): one spline (plus a SiLU branch) per node.

    x [N, inputs] -> [N, 1]. The output weights a start at 0. Source: LESA paper, eqs. 10-11.
    """

    def __init__(
        self, inputs: int, nodes: int = 256, intervals: int = 5, grid: Grid = (-3.0, 3.0)
    ) -> None:
        super().__init__()
        self.intervals, self.grid = check_grid(intervals, grid)
        self.projection = nn.Parameter(torch.randn(nodes, inputs) / inputs**0.5)  # p_m
        self.shift = nn.Parameter(torch.randn(nodes))  # q_m
        self.base = nn.Parameter(torch.ones(nodes))
        self.spline = nn.Parameter(torch.randn(nodes, intervals + 3) * 0.1)
        self.output = nn.Parameter(torch.zeros(nodes))  # a_m

    def forward(self, x: Tensor) -> Tensor:
        z = functional.linear(x, self.projection, self.shift)  # [N, nodes]
        index, weights = bspline_weights(z, self.intervals, self.grid)
        places = index[..., None] + torch.arange(4, device=x.device)
        node = torch.arange(z.shape[-1], device=x.device)[:, None]
        phi = (self.spline[node, places] * weights).sum(-1) + self.base * functional.silu(z)
        return functional.linear(phi, self.output[None])


class KAN(nn.Sequential):
    """Edge-spline layers of the given widths, the last of which starts at 0."""

    def __init__(
        self,
        widths: Sequence[int],
        intervals: int = 5,
        grid: Grid = (-3.0, 3.0),
        ending: bool = False,
    ) -> None:
        if len(widths) < 2 or min(widths) < 1:
            raise LesaError(
                f"widths={list(widths)}: not those of a network; give at least [inputs, outputs]"
            )
        last = len(widths) - 2
        super().__init__(
            *(
                EdgeSplineLayer(
                    widths[i], widths[i + 1], intervals, grid, zero=i == last, ending=ending
                )
                for i in range(last + 1)
            )
        )


class MLP(FullPrecision):
    """A SiLU net of the given widths, the last layer of which starts at 0: the paper's ablation."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)
        )
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(functional.silu(x) if i else x)
        return x


def check_grid(intervals: int, grid: Grid) -> tuple[int, Grid]:
    """The grid as numbers; LesaError unless it has an interval and grows."""
    low, high = grid
    if not low < high:
        raise LesaError(f"grid={grid!r}: it does not grow; the usual value is (-3, 3)")
    return whole("intervals", intervals, 1), (float(low), float(high))
