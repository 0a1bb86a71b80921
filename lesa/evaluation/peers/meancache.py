"""MeanCache: a skipped step takes the average velocity over its step, not the last one seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lesa.core.forecaster import Tap, check_sigmas
from lesa.core.schedule import Schedule
from lesa.core.table import Table
from lesa.errors import LesaError
from lesa.evaluation.method import Bench, Method, Peer
from lesa.evaluation.peers.per_run_cache import once_per_bench
from lesa.evaluation.peers.thresholds import needs_calibration
from lesa.evaluation.peers.trajectories import Trajectory, Trial, trajectories

__all__ = ["AVERAGED", "MeanCache", "edge_costs", "shortest_path"]

PROMPTS = 10
TRIED = 4  # prompts on which the exponents compete
SPANS = (1, 2, 3, 4, 5, 6)  # of the released tables
EXPONENTS = (1, 2, 4, 8)
_SAMPLER = "FlowMatchEulerDiscreteScheduler"


@dataclass(frozen=True, eq=False)
class MeanCache:
    """v_hat_s = v_{s-1} - J (sigma_{s+1} - sigma_s), over outputs and forecasts alike.

        J = (v_r - u) / (sigma_s - sigma_r), u = (x_s - x_r) / (sigma_s - sigma_r), r = s - K

    is the change of the velocity that the cached steps r .. s - 1 show: u is their average
    velocity, which under Euler's method is the mean of their v weighted with the steps in sigma. So
    each forecast is a mixture of the full steps' outputs, in each guidance branch alone (the
    release takes the guided velocity, of which this is the same mixture unless guidance rescales).
    K = 1 is reuse.

    spans: the K of every pair of neighbouring full steps, integers [S, S + 1]; S is the end.
    Source: MeanCache (arXiv 2601.19961), in the form of its released code.
    """

    spans: Tensor

    uses_latent = False
    tap: Tap = "output"
    name = "meancache"

    def history(self, schedule: Schedule) -> int:
        """All full steps: a window holds forecasts, which go back to older ones."""
        return len(schedule.full_steps)

    def table(self, schedule: Schedule, sigmas: Sequence[float], branch: str = "cond") -> Table:
        """The forecasts unrolled to the full steps; LesaError for another number of steps."""
        if schedule.steps != len(self.spans):
            raise LesaError(
                f"num_steps={schedule.steps}, but these spans are tied to {len(self.spans)} steps; "
                "choose them for that count"
            )
        levels = torch.tensor(check_sigmas(schedule, sigmas), dtype=torch.float64)
        full = schedule.full_steps
        made = torch.zeros(schedule.steps, len(full), dtype=torch.float64)
        made[list(full)] = torch.eye(len(full), dtype=torch.float64)
        for step in schedule.skipped_steps:
            edge = schedule.cached_before(step, 1)[0], next_full(schedule, step)
            first = max(0, step - int(self.spans[edge]))
            change = _change(levels, made[first:step], first)
            made[step] = made[step - 1] - change * (levels[step + 1] - levels[step])

        def row(step: int, cached: tuple[int, ...]) -> list[float]:
            return made[step, : len(cached)].flip(0).tolist()

        return Table.from_rows(schedule, len(full), row)


def _change(levels: Tensor, velocities: Tensor, first: int) -> Tensor:
    """J of the steps first .. first + len(velocities) - 1, [N]."""
    steps = levels[first : first + len(velocities) + 1].diff()
    average = (steps[:, None] * velocities).sum(0) / steps.sum()
    return (velocities[0] - average) / steps.sum()


def next_full(schedule: Schedule, step: int) -> int:
    """The full step after a skipped one, S where there is none."""
    return next((full for full in schedule.full_steps if full > step), schedule.steps)


def edge_costs(run: Trajectory) -> Tensor:
    """How badly each span's J tells the average velocity of a gap, float64 [K, S, S + 1].

    C_K[a, b] = mean |(x_b - x_a) / (sigma_b - sigma_a) - (v_a - J_K (sigma_b - sigma_a))| with the
    J_K that is known after step a and v_a the velocity of the guided run; 0 from a step to the
    next, infinite for b <= a.

    Raises: LesaError where the run's latents are not known.
    """
    if not len(run.latents):
        raise LesaError(
            "latents=[]: the pipeline does not move one latent by its scheduler once a step, so no "
            "average velocity can be told; leave meancache out"
        )
    levels = torch.tensor(run.sigmas, dtype=torch.float64)
    gaps = levels[None] - levels[:-1, None]  # [S, S + 1]
    steps = len(gaps)
    velocities = run.latents.diff(dim=0) / levels.diff()[:, None]
    costs = torch.full((len(SPANS), steps, steps + 1), torch.inf, dtype=torch.float64)
    for start in range(steps):
        ahead = gaps[start, start + 1 :, None]
        truth = (run.latents[start + 1 :] - run.latents[start]) / ahead
        for place, span in enumerate(SPANS):
            first = max(0, start + 1 - span)
            change = _change(levels, velocities[first : start + 1], first)
            error = (truth - (velocities[start] - change * ahead)).abs().mean(1)
            costs[place, start, start + 1 :] = error
            costs[place, start, start + 1] = 0.0
    return costs


def shortest_path(costs: Tensor, wanted: int, exponent: float) -> tuple[int, ...]:
    """The `wanted` full steps from 0 to the last step with the smallest sum of C^exponent, exactly.

    An exponent above 1 suppresses peaks: it prefers several small costs to a large one.
    """
    steps = len(costs)
    weights = costs[:, :steps] ** exponent
    best = torch.full((steps,), torch.inf, dtype=torch.float64)
    best[0] = 0.0
    before = []
    for _ in range(wanted - 1):
        best, came = (best[:, None] + weights).min(0)
        before.append(came)
    path = [steps - 1] if wanted > 1 else [0]
    for came in reversed(before):
        path.append(int(came[path[-1]]))
    return tuple(reversed(path))


@dataclass(frozen=True)
class MeanCachePeer:
    """MeanCache on the shortest path of its own costs; the last step is full, as in its tables.

    The exponent that suppresses peaks is not in the public text: of 1, 2, 4 and 8 the one whose
    list ends nearest to the plain run on 4 calibration prompts.
    """

    takes_lists = True

    def unfit(self, bench: Bench) -> str | None:
        """It needs calibration prompts, and a sampler that follows a velocity by Euler's method."""
        kind = type(getattr(bench.pipe, "scheduler", None)).__name__
        if bench.pipe is not None and kind != _SAMPLER:
            return f"needs velocities and {_SAMPLER}, not {kind}; leave it out"
        return needs_calibration(bench)

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """Exactly `wanted` full steps, or the given ones."""
        costs, steps = _costs(bench), bench.num_steps
        forecaster = MeanCache(costs.min(0).indices + SPANS[0])
        if searched is not None:
            return Method(name, steps, forecaster, searched.bind(steps), "searched")
        best = costs.min(0).values
        lists = {shortest_path(best, wanted, p): p for p in EXPONENTS}
        schedules = {Schedule.explicit(full, steps): p for full, p in lists.items()}
        schedule = next(iter(schedules))
        if len(schedules) > 1:
            schedule = min(schedules, key=partial(_error, bench, forecaster))
        note = f"exponent {schedules[schedule]}"
        return Method(name, steps, forecaster, schedule, note=note)


def _error(bench: Bench, forecaster: MeanCache, schedule: Schedule) -> float:
    from lesa.api import accelerate

    return _trial(bench).error(partial(accelerate, forecaster=forecaster, schedule=schedule))


@once_per_bench
def _trial(bench: Bench) -> Trial:
    return Trial(bench, TRIED)


@once_per_bench
def _costs(bench: Bench) -> Tensor:
    return torch.stack([edge_costs(run) for run in trajectories(bench, PROMPTS)]).mean(0)


AVERAGED: dict[str, Peer] = {"meancache": MeanCachePeer()}
