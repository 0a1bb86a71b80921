"""The paper's closed loop: what a run that follows its own forecasts finds at its full steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.forecasters.paper import PaperForm
from lesa.training.closed_loop import run_rollouts, steps_computed
from lesa.training.job import Job
from lesa.training.rollout import Rollout, RolloutSpec, Tails, Visit
from lesa.training.row_fit import mixed
from lesa.training.statistics import inner_products

PROMPTS = 4  # of the calibration prompts


@dataclass
class _Recorder(Rollout):
    """Keeps the features of its full steps, and where there are rows forecasts the others from the
    last steps, real or forecast.

    The paper's rows are ``biased``: coefficients and bias; its ``windows`` hold steps of all kinds.
    """

    biased: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    windows: dict[str, list[Tensor]] = field(default_factory=dict)
    seen: dict[str, list[Tensor]] = field(default_factory=dict)

    def push(self, branch: str, feature: Tensor) -> None:
        self._enter(branch, feature.clone())
        self.seen.setdefault(branch, []).append(feature.float().flatten())

    def forecast(
        self,
        at: Visit,
        latent: Tensor,
        base: tuple[Tensor, Tensor] | None,
        tails: Tails | None = None,
        fitted: Sequence[int] | None = None,
    ) -> Tensor:
        window, (weights, bias) = self.windows[at.branch], self.biased[at.branch]
        feature = mixed(weights[at.step, : len(window)].tolist(), window) + float(bias[at.step])
        feature = feature.to(window[0].dtype)
        self._enter(at.branch, feature)
        return feature if tails is None else tails(None)(feature)

    def _enter(self, branch: str, feature: Tensor) -> None:
        window = self.windows.setdefault(branch, [])
        window.insert(0, feature)
        del window[self.spec.history :]


def visited_gram(
    job: Job, net: PaperForm, schedule: Schedule, sigmas: Sequence[float], branches: Sequence[str]
) -> dict[str, Tensor]:
    """Branch -> inner products, float64 on the host, of the base run's features at all steps, the
    features that the accelerated run has at its full steps, and the constant one, in this order."""
    with torch.no_grad():
        rows = {branch: net.rows(schedule, sigmas, branch) for branch in branches}
    every = Schedule.explicit(range(schedule.steps), schedule.steps)
    base = _Recorder(RolloutSpec(every, net.history))
    fast = _Recorder(RolloutSpec(schedule, net.history), biased=rows)
    prompts = range(min(PROMPTS, len(job.prompts)))
    work = job.rows(steps_computed([base, fast]), len(prompts))
    with job.phase("run with own forecasts", work):
        run_rollouts(job, [base, fast], lambda *_: torch.empty(0), schedule.steps, prompts=prompts)
    found = {}
    for branch in branches:
        vectors = torch.stack([*base.seen[branch], *fast.seen[branch]])
        vectors = torch.cat([vectors, torch.ones_like(vectors[:1])])
        found[branch] = vectors.shape[1] * inner_products(vectors)
    return found
