"""DPCache: full steps by an exact dynamic programme over measured errors of straight lines."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.evaluation.method import Bench, Method, Peer
from lesa.evaluation.peers.per_run_cache import once_per_bench
from lesa.evaluation.peers.thresholds import needs_calibration
from lesa.evaluation.peers.trajectories import trajectories
from lesa.forecasters.taylor import Taylor

__all__ = ["PLANNED", "line_errors", "plan", "transition_costs"]

PROMPTS = 10  # as its authors calibrate
LEAD = 3  # steps 0, 1 and 2 are full
LONGEST = 0.4  # the cap on a gap, as a share of the run: 20 of 50 steps


@dataclass(frozen=True)
class DPCache:
    """The line through the two newest full steps i < j, and the list of full steps that minimises
    sum C[i, j, k] over neighbouring full steps i < j < k, the end of the run being a last k:

        C[i, j, k] = sum_{j < t < k} mean |h_j + (h_j - h_i) / (j - i) (t - j) - h_t|,

    mean over elements, guidance branches and 10 calibration prompts. Steps 0 to 2 are full, gaps
    are 20 of 50 steps at most. The feature is the model's output here, as of the other forecasters
    in a comparison (in the paper it is the one in front of the last norm).
    On another list it would be TaylorSeer of order 1, which has rows of its own.
    Source: DPCache (arXiv 2602.22654).
    """

    takes_lists = False

    def unfit(self, bench: Bench) -> str | None:
        """It plans on calibration prompts."""
        return needs_calibration(bench)

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """Exactly `wanted` full steps."""
        steps = bench.num_steps
        schedule = Schedule.explicit(plan(_errors(bench), wanted), steps)
        return Method(name, steps, Taylor(order=1), schedule)


def line_errors(features: Tensor, longest: int) -> Tensor:
    """E[i, j, t] = mean |line through h_i and h_j at t - h_t| for i < j < t, float64 [S, S, S].

    features: [S, N]. longest: the cap on j - i and on t - j; beyond it, and elsewhere, E is 0.
    """
    steps = len(features)
    errors = torch.zeros(steps, steps, steps, dtype=torch.float64)
    for last in range(1, steps - 1):
        first = max(0, last - longest)
        gaps = torch.arange(last - first, 0, -1, dtype=features.dtype)
        slopes = (features[last] - features[first:last]) / gaps[:, None]
        for step in range(last + 1, min(steps, last + longest + 1)):
            ahead = features[last] - features[step]
            line = ahead + slopes * (step - last)
            errors[first:last, last, step] = line.abs().mean(1).double()
    return errors


def transition_costs(errors: Tensor, longest: int) -> Tensor:
    """C[i, j, k] for k up to S, the end of the run, float64 [S, S, S + 1]; infinite where i < j < k
    or the cap on the gaps does not hold."""
    steps = len(errors)
    summed = torch.cat([torch.zeros(steps, steps, 1, dtype=errors.dtype), errors.cumsum(2)], 2)
    i, j = torch.arange(steps)[:, None, None], torch.arange(steps)[None, :, None]
    k = torch.arange(steps + 1)[None, None]
    allowed = (i < j) & (j < k) & (j - i <= longest) & (k - j <= longest)
    return torch.where(allowed, summed, torch.inf)


def plan(errors: Tensor, wanted: int) -> tuple[int, ...]:
    """The list of `wanted` full steps with the smallest sum of C, exactly.

    D[m + 1, j, k] = min_i D[m, i, j] + C[i, j, k] over the pairs of newest full steps; the cap
    gives way where so few full steps cannot keep it.
    """
    steps, lead = len(errors), min(LEAD, wanted)
    if lead < 2 or wanted == steps:
        return tuple(range(wanted))
    costs = transition_costs(errors, longest_gap(steps, wanted))
    best = torch.full((steps, steps), torch.inf, dtype=torch.float64)
    best[lead - 2, lead - 1] = 0.0
    before = []  # before[n][j, k]: the full step in front of the pair j, k
    for _ in range(wanted - lead):
        best, came = (best[:, :, None] + costs[:, :, :steps]).min(0)
        before.append(came)
    ended = (best + costs[:, :, steps]).flatten()
    pair = divmod(int(ended.argmin()), steps)
    chosen = [pair[1], pair[0]]
    for came in reversed(before):
        pair = (int(came[pair]), pair[0])
        chosen.append(pair[0])
    return tuple(sorted({*chosen, *range(lead)}))


def longest_gap(steps: int, wanted: int) -> int:
    """The cap on the gaps between `wanted` full steps and the end of the run."""
    lead = min(LEAD, wanted)
    return max(round(LONGEST * steps), ceil((steps - lead + 1) / (wanted - lead + 1)))


@once_per_bench
def _errors(bench: Bench) -> Tensor:
    """E without a cap that some number of full steps may have to exceed, mean over the runs."""
    found = [
        line_errors(features, bench.num_steps)
        for run in trajectories(bench, PROMPTS)
        for features in run.outputs.values()
    ]
    return torch.stack(found).mean(0)


PLANNED: dict[str, Peer] = {"dpcache": DPCache()}
