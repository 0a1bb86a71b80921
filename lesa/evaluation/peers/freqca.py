"""FreqCa: low spatial frequencies of the hidden feature are reused, high ones forecast."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lesa.core.schedule import Schedule
from lesa.engine.mixer import Mixer
from lesa.engine.ring import Ring
from lesa.engine.step_table import StepTable
from lesa.errors import LesaError
from lesa.evaluation.peers.controller import StepCache, controlled
from lesa.evaluation.peers.thresholds import Applied
from lesa.forecasters.hicache import HiCache
from lesa.hooks.denoiser import Denoiser
from lesa.hooks.step_clock import Step

CUTOFF = 0.1  # of the highest frequency


@dataclass
class _State:
    ring: Ring | None = None
    mixer: Mixer | None = None
    low: Tensor | None = None
    data: Tensor | None = None  # the ring's memory, to be counted


class FreqCa(StepCache[_State]):
    """h_hat_s = h_p's low band + HiCache's high band (order 2, sigma 0.71), by a 2-D DCT.

    Both bands are linear in the cached features, so h_hat = f + P (h_p - f) with HiCache's forecast
    f of the whole feature and the projection P on the low band. A coefficient is low where
    sqrt(u^2 + v^2) is at most 0.1 of its largest value. The grid is that of the picture's tokens;
    a video is taken frame by frame, and other pictures' tokens in the sequence likewise.
    Source: FreqCa (arXiv 2510.08669).
    """

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        super().__init__(model)
        self._plan = StepTable(HiCache(order=2, sigma=0.71).table(schedule))

    def begin(self) -> _State:
        return _State()

    def step(
        self, denoiser: Denoiser, step: Step, state: _State, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        if self._plan.rows[step.index] is None:
            output, feature = self.full(denoiser, args, kwargs)
            if state.ring is None:
                grid = self.layout.grid((denoiser, args, kwargs))
                state.low = low_band(*grid).to(feature)
                state.ring = Ring(self._plan.history, feature)
                state.mixer = Mixer(self._plan, state.ring)
                state.data = state.ring.data
            if self._plan.pushes[step.index]:
                state.ring.push(feature)
            return output
        assert state.ring is not None and state.mixer is not None and state.low is not None
        newest = state.ring.features[state.ring.order[0]]
        forecast = state.mixer(step.index, torch.empty_like(newest))
        forecast += project(newest - forecast, state.low)
        return denoiser.run_tail(forecast, args, kwargs).output


def freqca(schedule: Schedule) -> Applied:
    """Pipeline -> the context manager that puts FreqCa on it; see `FreqCa`."""
    return lambda pipe: controlled(pipe, lambda model: FreqCa(model, schedule))


def dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II, float64 [size, size].

    D[u, n] = sqrt((2 - [u = 0]) / size) cos(pi (2 n + 1) u / (2 size)).
    """
    n = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (n + 0.5) * n[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def low_band(height: int, width: int, cutoff: float = CUTOFF) -> Tensor:
    """Orthonormal rows that span the low frequencies of a picture, float64 [N, height x width]."""
    rows, columns = dct_matrix(height), dct_matrix(width)
    u, v = torch.arange(height), torch.arange(width)
    radius = torch.hypot(u[:, None].double(), v[None].double())
    kept = (radius <= cutoff * radius.max()).nonzero()
    return torch.stack([torch.outer(rows[u], columns[v]).flatten() for u, v in kept.tolist()])


def project(feature: Tensor, low: Tensor) -> Tensor:
    """The low band of a feature [B, F x height x width, C], frame by frame.

    Raises: LesaError where the tokens do not fill whole frames.
    """
    size = low.shape[1]
    if feature.shape[1] % size:
        raise LesaError(
            f"grid: {feature.shape[1]} tokens are not frames of {size}; leave this method out"
        )
    frames = feature.unflatten(1, (-1, size))  # [B, F, height x width, C]
    return (low.T @ (low @ frames)).flatten(1, 2)
