"""Coefficients as functions of continuous time: serve any step count and any full steps."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor, nn

from lesa.core.schedule import Schedule
from lesa.forecasters.kan import KAN, FullPrecision
from lesa.forecasters.settings import Settings

SMALLEST_GAP = 1 / 256
INTERVALS = 8
GRID = (-1.25, 1.25)  # the inputs lie in [-1, 1]; a wider grid left its outer splines unused


class TableForm(FullPrecision):
    """First-order extrapolation in sigma, nothing learned: the base of the calibrated rows."""

    autoregressive = False

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings

    @property
    def history(self) -> int:
        """K, the number of cached features."""
        return self.settings.history

    def coefficients(
        self, target_sigma: Tensor, cached_sigmas: Tensor, valid: Tensor, branch: str
    ) -> Tensor:
        """float64 [N, K + uses_latent] for targets [N], cached [N, K] (newest first), valid [N, K].

        `valid` marks the features that exist: a prefix of each row, at least the newest.
        """
        base = extrapolation(target_sigma.double(), cached_sigmas.double(), valid)
        return nn.functional.pad(base, (0, int(bool(self.settings.uses_latent))))

    def rows(
        self, schedule: Schedule, sigmas: Sequence[float], branch: str
    ) -> tuple[Tensor, Tensor | None]:
        """Differentiable coefficients [S, K + uses_latent], zero at full steps, and no bias."""
        parameter = next(self.parameters(), torch.empty(0))
        levels = torch.tensor(sigmas, dtype=torch.float64, device=parameter.device)
        width = self.history + int(bool(self.settings.uses_latent))
        result = levels.new_zeros(schedule.steps, width)
        if not schedule.skipped_steps:
            return result, None
        skipped = torch.tensor(schedule.skipped_steps, device=levels.device)
        lists = [schedule.cached_before(s, self.history) for s in schedule.skipped_steps]
        padded = [[*cached, *[0] * (self.history - len(cached))] for cached in lists]
        counts = torch.tensor([len(cached) for cached in lists], device=levels.device)
        valid = torch.arange(self.history, device=levels.device) < counts[:, None]
        cached_sigmas = levels[torch.tensor(padded, device=levels.device)]
        found = self.coefficients(levels[skipped], cached_sigmas, valid, branch)
        return result.index_copy(0, skipped, found), None


class ContinuousForm(TableForm):
    """coefficients = extrapolation(sigmas) + KAN_stage(time), one KAN per branch and stage.

    The KAN sees the target's noise level and the gaps from it to the newest cached step, from that
    to the next, and so on, as logarithms (the best weights depend on ratios of gaps: on a
    Gaussian-mixture flow this cut the excess over the least-squares bound from 60 % to 20 %), all
    scaled to [-1, 1]. It returns 0 at first. A missing feature's input is 0 and its learned weight
    is shared out among the features that exist, so their sum does not change.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        width = settings.history + int(bool(settings.uses_latent))
        widths = [settings.history + 1, *settings.hidden, width]
        self.experts = nn.ModuleDict(
            {
                branch: nn.ModuleList(
                    KAN(widths, settings.intervals or INTERVALS, GRID)
                    for _ in range(len(settings.stages) + 1)
                )
                for branch in settings.branches
            }
        )

    def coefficients(
        self, target_sigma: Tensor, cached_sigmas: Tensor, valid: Tensor, branch: str
    ) -> Tensor:
        base = super().coefficients(target_sigma, cached_sigmas, valid, branch)
        inputs = time_inputs(target_sigma.double(), cached_sigmas.double(), valid)
        return base + fold(self._learned(inputs, target_sigma, branch).double(), valid)

    def _learned(self, inputs: Tensor, target_sigma: Tensor, branch: str) -> Tensor:
        experts: Sequence[nn.Module] = list(self.experts[branch].children())
        inputs = inputs.to(next(self.parameters()).dtype)
        bounds = torch.tensor(self.settings.stages, dtype=torch.float64, device=inputs.device)
        stage = (target_sigma.double()[:, None] <= bounds).sum(-1)  # [N]
        order = [(stage == i).nonzero()[:, 0] for i in range(len(experts))]
        parts = [expert(inputs[at]) for expert, at in zip(experts, order, strict=True)]
        return torch.cat(parts)[torch.cat(order).argsort()]


def extrapolation(target: Tensor, cached: Tensor, valid: Tensor) -> Tensor:
    """Weights [N, K] of the line in sigma through the two newest features, reuse with one."""
    weights = torch.zeros_like(cached)
    weights[:, 0] = 1
    if cached.shape[1] > 1:
        two = valid[:, 1]
        gap = torch.where(two, cached[:, 0] - cached[:, 1], 1.0)
        reach = torch.where(two, (target - cached[:, 0]) / gap, 0.0)
        weights[:, 0] += reach
        weights[:, 1] -= reach
    return weights


def time_inputs(target: Tensor, cached: Tensor, valid: Tensor) -> Tensor:
    """The KAN's inputs [N, K + 1] in [-1, 1]: noise level, then the log gaps, 0 where missing."""
    times = torch.cat([target[:, None], cached], dim=1)
    gaps = torch.where(valid, times.diff(dim=1), 0.0).clamp(min=0)
    span = log(1 / SMALLEST_GAP + 1)
    scaled = 1 + 2 * torch.log((gaps + SMALLEST_GAP) / (1 + SMALLEST_GAP)) / span
    return torch.cat([2 * target[:, None] - 1, torch.where(valid, scaled, 0.0)], dim=1)


def fold(learned: Tensor, valid: Tensor) -> Tensor:
    """Shares the weights [N, K (+ 1)] of missing features among the valid ones of their row."""
    features = learned[:, : valid.shape[1]]
    missing = torch.where(valid, 0.0, features).sum(1, keepdim=True)
    share = missing / valid.sum(1, keepdim=True)
    kept = torch.where(valid, features + share, 0.0)
    return torch.cat([kept, learned[:, valid.shape[1] :]], dim=1)
