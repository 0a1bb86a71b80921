"""The paper's predictor: a temporal projection per stage and a scalar gate per step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lesa_kernels.gate import fold_times, pack_gate
from torch import Tensor, nn

from lesa.core.schedule import Schedule
from lesa.core.table import GatedRows
from lesa.errors import LesaError
from lesa.forecasters.kan import KAN, MLP, FullPrecision, RidgeSpline
from lesa.forecasters.settings import Settings

INTERVALS = 5  # as in LESA's release


class PaperForm(FullPrecision):
    """h_hat = h_{s-1} + alpha z, z = sum_k w_k h_{s-k} + b, alpha = gate(t_s - t_0..t_S).

    The window holds the last K steps, real or predicted; where it is short, the missing features
    repeat the oldest one. Per guidance branch and stage:
    `w[branch][stage]` [window(stage)], newest first; `b[branch]` [stages], so `b[branch][stage]` is
    a scalar; `gate(branch, stage, tau)`. At first w takes the last difference and the gate is 0,
    so the untrained predictor is reuse. Source: LESA (arXiv 2602.20497), eqs. 4-7, 10-11.
    """

    autoregressive = True

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.windows: tuple[int, ...] = settings.windows or ()
        branches = settings.branches
        self.w = nn.ModuleDict(
            {name: nn.ParameterList(map(_last_difference, self.windows)) for name in branches}
        )
        self.b = nn.ParameterDict({name: torch.zeros(len(self.windows)) for name in branches})
        self.gates = nn.ModuleDict(
            {name: nn.ModuleList(make_gate(settings) for _ in self.windows) for name in branches}
        )

    @property
    def history(self) -> int:
        """The widest window."""
        return max(self.windows)

    def stage_of(self, sigma: float) -> int:
        """The expert for a noise level."""
        return self.settings.stage_of(sigma)

    def window(self, stage: int) -> int:
        """K of this stage."""
        return self.windows[stage]

    def offsets(self, sigmas: Sequence[float] | Tensor) -> Tensor:
        """tau [S, S + 1], tau[s, i] = t_s - t_i, in the parameters' dtype and device."""
        times = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
        return (times[:-1, None] - times[None, :]).to(next(self.parameters()))

    def gate(self, branch: str, stage: int, tau: Tensor) -> Tensor:
        """alpha [N] for tau [N, S + 1] (rows of `offsets`), differentiable."""
        return self.gates[branch][stage](tau)[:, 0]  # type: ignore[index]

    def rows(
        self, schedule: Schedule, sigmas: Sequence[float], branch: str
    ) -> tuple[Tensor, Tensor]:
        """Differentiable coefficients [S, K] and bias [S] in float64, zero at full steps.

        Raises LesaError for another number of steps than the gate was made for.
        """
        if schedule.steps != self.settings.num_steps:
            raise LesaError(
                f"num_steps={schedule.steps}: this forecaster of form='paper' is tied to "
                f"{self.settings.num_steps} steps; use that count or train form='continuous'"
            )
        stages = [self.stage_of(sigma) for sigma in sigmas[:-1]]
        tau = self.offsets(sigmas)
        coefficients = tau.new_zeros(schedule.steps, self.history, dtype=torch.float64)
        bias = coefficients.new_zeros(schedule.steps)
        for stage in set(stages):
            steps = [s for s in schedule.skipped_steps if stages[s] == stage]
            if not steps:
                continue
            at = torch.tensor(steps, device=tau.device)
            alpha = self.gate(branch, stage, tau[at]).double()  # [n]
            w = self.w[branch][stage].double()  # type: ignore[index]
            weights = torch.stack([self._fitted(w, s) for s in steps])  # [n, K]
            found = alpha[:, None] * weights
            found = found + nn.functional.one_hot(torch.zeros_like(at), self.history)
            coefficients = coefficients.index_copy(0, at, found)
            bias = bias.index_copy(0, at, alpha * self.b[branch][stage].double())
        return coefficients, bias

    def gated(self, schedule: Schedule, sigmas: Sequence[float], branch: str) -> GatedRows | None:
        """The same rows with the gate left to a kernel; None where it is not made of ridges."""
        gates = [gate for gate in self.gates[branch].children() if isinstance(gate, RidgeSpline)]
        if len(gates) < len(self.windows):
            return None
        stages = [self.stage_of(sigma) for sigma in sigmas[:-1]]
        weights = torch.zeros(schedule.steps, self.history, dtype=torch.float64, device="cpu")
        for s in schedule.skipped_steps:
            w = self.w[branch][stages[s]].detach()  # type: ignore[index]
            weights[s] = self._fitted(w.to("cpu", torch.float64), s)
        bias = self.b[branch].detach().to("cpu", torch.float64)[stages]
        times = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
        gate = fold_times(pack_gate(gates), times)
        experts = torch.tensor(stages, dtype=torch.int32, device="cpu")
        return GatedRows(weights, bias, times[:-1, None], experts, gate)

    def _fitted(self, w: Tensor, step: int) -> Tensor:
        """w on the features that exist before `step`, padded to the widest window."""
        held = min(step, len(w))
        kept = torch.cat([w[: held - 1], w[held - 1 :].sum()[None]])
        return nn.functional.pad(kept, (0, self.history - held))


def make_gate(settings: Settings) -> nn.Module:
    """[N, S + 1] -> [N, 1], zero at first: ridge or edge splines, or the ablation's MLP."""
    inputs, nodes = settings.num_steps + 1, settings.nodes
    if settings.gate == "mlp":
        return MLP([inputs, nodes, nodes, 1])
    if settings.spline == "edge":
        return KAN([inputs, nodes, nodes, 1], settings.intervals or INTERVALS, ending=True)
    return RidgeSpline(inputs, nodes, settings.intervals or INTERVALS)


def _last_difference(window: int) -> nn.Parameter:
    return nn.Parameter(torch.tensor(([1.0, -1.0] + [0.0] * window)[:window]))
