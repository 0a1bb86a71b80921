"""All gaps together, on the final latent.

The closed loop fits one step after the other, each to its own target. Gauss-Newton on true
accelerated runs sees how the steps' errors add up or cancel, and what the model itself makes of
them at later full steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

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
    places = _places(rollout.fixed(), sigmas)
    for turn in range(rounds if places else 0):
        rollout = _round(job, rollout, places, len(sigmas) - 1, turn, budget / rounds)
    return rollout


def _round(
    job: Job,
    rollout: Rollout,
    places: Sequence[Place],
    num_steps: int,
    turn: int,
    budget: float,
) -> Rollout:
    """One step of Gauss-Newton, of as many gaps and on as many prompts as the budget pays for."""
    here = rollout.fixed()
    places = _affordable(here, places, DERIVATIVES * budget)
    if not places:
        return rollout
    each = _slope_steps(here, places)
    some = _some(job.fitted, min(MOST, int(DERIVATIVES * budget / each)), turn)
    last = (len(RACE) + 1) * len(here.spec.schedule.full_steps)  # at most, of a prompt that judges
    judges = job.mixed(int((budget - each * len(some)) / last))
    if len(judges) < min(FEWEST, len(job.prompts)):
        return rollout
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
    count = min(count, len(fitted))
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
