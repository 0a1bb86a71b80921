"""All gaps together, on the final latent.

The closed loop fits one step after the other, each to its own target. Gauss-Newton on true
accelerated runs sees how the steps' errors add up or cancel, and what the model itself makes of
them at later full steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from lesa.training.closed_loop import run_rollouts, steps_computed
from lesa.training.job import Job
from lesa.training.objective import quality
from lesa.training.rollout import EARLY, Rollout

MOVE = 0.02  # of a coefficient, for its derivative
TOGETHER = 16  # rollouts in one call
DERIVATIVES = 0.7  # share of the budget, at most; the rest is for what races
FEWEST = 2  # prompts that judge what races
MOST = 8  # prompts that a round takes its derivatives on
RACE = ((1e-2, 1.0), (1e-2, 0.5), (1e-1, 1.0))  # damping, share of the step

# branch, step, column; where parts have rows (column, part), and the column alone for all of them
Place = tuple[str, int, int | tuple[int, int]]


def joint_fit(
    job: Job, rollout: Rollout, sigmas: Sequence[float], rounds: int, budget: float
) -> Rollout:
    """A rollout whose final latents are nearer to the base run's, or the same rollout.

    Minimises sum_p |x_T - x_T^base|^2 over pictures by Gauss-Newton. The derivatives of each round
    are taken on another part of the fitted prompts. What races is judged like all rollouts, on
    prompts that are fitted and on those that are not. Early rows keep their shrinkage: what the
    final latents of a few prompts would make of them fails the odd one. The ``budget``, in full
    steps of a prompt, says on how many prompts all this runs, and on how many gaps.
    """
    here, steps = rollout.fixed(), len(sigmas) - 1
    places = _places(here, sigmas)
    plans = _paid(job, here, places, rounds, budget) if places else []
    if places and len(plans) < rounds:
        told = f"{len(plans) or 'no'} round{'s' * (len(plans) != 1)}"
        count = len(here.spec.schedule.full_steps)
        job.progress.line(
            f"polish={rounds}: the budget pays for {told} of the joint fit at {count} of {steps} "
            "steps in full"
        )
    for turn, plan in enumerate(plans):
        rollout = _round(job, rollout, steps, turn, plan)
    return rollout


class _Plan(NamedTuple):
    """What a round moves, on how many prompts it takes derivatives, and the prompts that judge."""

    places: Sequence[Place]
    prompts: int
    judges: Sequence[int]


def _paid(
    job: Job, here: Rollout, places: Sequence[Place], rounds: int, budget: float
) -> list[_Plan]:
    """Equal plans of as many rounds as the budget pays for."""
    most = int(budget / (_fewest(job) * _last(here)))
    for count in range(min(rounds, most), 0, -1):
        plan = _plan(job, here, places, budget / count)
        if plan is not None:
            return [plan] * count
    return []


def _plan(job: Job, here: Rollout, places: Sequence[Place], budget: float) -> _Plan | None:
    """As many gaps and prompts as the budget of a round pays for; None where that is no round."""
    places = _affordable(here, places, DERIVATIVES * budget)
    if not places:
        return None
    each = _slope_steps(here, places)
    prompts = min(MOST, int(DERIVATIVES * budget / each), len(job.fitted))
    judges = job.mixed(int((budget - each * prompts) / _last(here)))
    return _Plan(places, prompts, judges) if len(judges) >= _fewest(job) else None


def _last(here: Rollout) -> int:
    """Full steps, at most, of each prompt that judges a round."""
    return (len(RACE) + 1) * len(here.spec.schedule.full_steps)


def _fewest(job: Job) -> int:
    """How many prompts must judge a round."""
    return min(FEWEST, len(job.prompts))


def _round(job: Job, rollout: Rollout, num_steps: int, turn: int, plan: _Plan) -> Rollout:
    """One step of Gauss-Newton."""
    here, (places, prompts, judges) = rollout.fixed(), plan
    some, each = _some(job.fitted, prompts, turn), _slope_steps(here, places)
    with job.phase("derivatives of the final latents", job.rows(each, len(some))) as bar:
        bar.detail = f"{len(places)} coefficients, {len(some)} prompts, {num_steps} steps"
        error, slopes = _slopes(job, here, places, num_steps, some)
    found = [(share, _step(error, slopes, damping)) for damping, share in RACE]
    tried = [_moved(here, places, share * step) for share, step in found]
    each = steps_computed([here, *tried])
    with job.phase("fit on final latents", job.rows(each, len(judges))) as bar:
        bar.detail = f"{len(tried)} steps of Gauss-Newton on {len(judges)} prompts"
        run_rollouts(job, [here, *tried], None, num_steps, prompts=judges)
    return max([here, *tried], key=quality)


def _some(fitted: Sequence[int], count: int, turn: int) -> list[int]:
    """The prompts that a round takes its derivatives on: so many after those of the last one."""
    return [fitted[(turn * count + i) % len(fitted)] for i in range(count)]


def _places(rollout: Rollout, sigmas: Sequence[float]) -> list[Place]:
    """The coefficients of the last skipped step in each gap that does not end early.

    What a gap hands to the next full step is a sum of the cached features and of the latent at its
    beginning: the last row reaches all of them, earlier rows reach no more.
    """
    spec, schedule, found = rollout.spec, rollout.spec.schedule, []
    for branch, rows in _rows(rollout).items():
        latent = [rows.shape[1] - 1] if spec.uses_latent else []
        parts = rows.shape[2] if rows.ndim == 3 else 0
        for step in schedule.skipped_steps:
            if step + 1 in schedule.skipped_steps or sigmas[step] > EARLY:
                continue
            held = len(schedule.cached_before(step, spec.history))
            features = [*product(range(held), range(parts))] if parts else [*range(held)]
            found += [(branch, step, column) for column in [*features, *latent]]
    return found


def _moved(rollout: Rollout, places: Sequence[Place], moves: Tensor) -> Rollout:
    rows = {branch: row.clone() for branch, row in _rows(rollout).items()}
    for (branch, step, column), move in zip(places, moves.tolist(), strict=True):
        rows[branch][step][column] += move
    return Rollout(replace(rollout.spec, rows=rows))


def _nearby(rollout: Rollout, places: Sequence[Place]) -> list[list[Rollout]]:
    """The rollout and those with one coefficient moved, as they run together."""
    one = torch.full((1,), MOVE)
    return [
        [rollout, *(_moved(rollout, [place], one) for place in places[at : at + TOGETHER])]
        for at in range(0, len(places), TOGETHER)
    ]


def _affordable(rollout: Rollout, places: Sequence[Place], budget: float) -> Sequence[Place]:
    """The coefficients of as many gaps as the derivatives on one prompt pay for, the longest first;
    what a long one makes wrong is more."""
    schedule = rollout.spec.schedule

    def gap(place: Place) -> tuple[int, int]:  # its length, its last step
        return place[1] - schedule.cached_before(place[1], 1)[0], place[1]

    while places and _slope_steps(rollout, places) > budget:
        shortest = min(map(gap, places))
        places = [place for place in places if gap(place) != shortest]
    return places


def _slope_steps(rollout: Rollout, places: Sequence[Place]) -> int:
    """Full steps of each prompt that the derivatives take."""
    return sum(steps_computed(group) for group in _nearby(rollout, places))


def _slopes(
    job: Job,
    rollout: Rollout,
    places: Sequence[Place],
    num_steps: int,
    prompts: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Error ``[pictures, elements]`` on some prompts, and for each place its derivative by the
    coefficient, ``[places, pictures, elements]``."""
    found = []
    for here, *near in _nearby(Rollout(rollout.spec), places):
        run_rollouts(job, [here, *near], None, num_steps, prompts=prompts)
        found += [(_error(other) - _error(here)) / MOVE for other in near]
    return _error(here), torch.stack(found)


def _step(error: Tensor, slopes: Tensor, damping: float) -> Tensor:
    """Gauss-Newton's step; damping is relative to the mean of the normal matrix's diagonal."""
    flat = slopes.flatten(1)
    matrix, onto = flat @ flat.T, flat @ error.flatten()
    pull = damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)
    return -torch.linalg.solve(matrix + pull, onto)


def _error(rollout: Rollout) -> Tensor:
    assert rollout.result.error is not None
    return rollout.result.error


def _rows(rollout: Rollout) -> Mapping[str, Tensor]:
    assert rollout.spec.rows is not None  # fixed
    return rollout.spec.rows
