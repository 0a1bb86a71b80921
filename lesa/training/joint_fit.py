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
from lesa.training.rollout import EARLY, Rollout, quality

MOVE = 0.02  # of a coefficient, for its derivative
TOGETHER = 16  # rollouts in one call
PROMPTS = 8  # that a round takes its derivatives on
RACE = ((1e-3, 0.5), (1e-2, 0.5), (1e-2, 1.0), (1e-1, 1.0))  # damping, share of the step

# branch, step, column; where parts have rows (column, part), and the column alone for all of them
Place = tuple[str, int, int | tuple[int, int]]


def joint_fit(
    job: Job, rollout: Rollout, sigmas: Sequence[float], rounds: int = 2, base: Tensor | None = None
) -> Rollout:
    """A rollout whose final latents are nearer to the base run's, or the same rollout.

    Minimises sum_p log |x_T - x_T^base|^2 over pictures, that is their mean dB: Gauss-Newton with
    each picture weighted by the inverse of its own squared error. The derivatives of each round
    are taken on another part of the prompts, so that a round costs no more with many of them; what
    races is judged like all rollouts, on all prompts, by mean and 10th percentile. Early rows
    keep their shrinkage: what the final latents of a few prompts would make of them fails the odd
    one. ``base`` are the final latents of the plain run, where they are known.
    """
    best, num_steps = rollout.fixed(), len(sigmas) - 1
    places = _places(best, sigmas)
    if not places or not rounds:
        return rollout
    base = run_rollouts(job, [best], None, num_steps, base=base)
    for turn in range(rounds):
        some = _some(len(job.prompts), turn)
        error, slopes = _slopes(job, best, places, num_steps, base, some)
        moves = [share * _step(error, slopes, damping) for damping, share in RACE]
        tried = [_moved(best, dict(zip(places, move.tolist(), strict=True))) for move in moves]
        run_rollouts(job, tried, None, num_steps, base=base)
        best = max([best, *tried], key=quality)
    return best if rollout.result.score is None or quality(best) > quality(rollout) else rollout


def joint_steps(
    job: Job, rollout: Rollout, sigmas: Sequence[float], rounds: int, base: Tensor | None
) -> int:
    """How many steps of a picture `joint_fit` computes in full, over all prompts."""
    here, places = rollout.fixed(), _places(rollout.fixed(), sigmas)
    if not places or not rounds:
        return 0
    prompts, found = len(job.prompts), 0
    for some in (_some(prompts, turn) for turn in range(rounds)):
        near = [_moved(here, {place: MOVE}, leaves=place[1]) for place in places]
        shared = -(-len(places) // TOGETHER) * steps_computed([here])
        found += len(some) * (shared + steps_computed(near))
        found += prompts * steps_computed([here] * len(RACE))
    first = steps_computed([here], 0 if base is not None else len(sigmas) - 1)
    return (found + prompts * first) * job.pictures


def _some(prompts: int, turn: int) -> range:
    """The prompts that a round takes its derivatives on."""
    parts = -(-prompts // PROMPTS)
    return range(turn % parts, prompts, parts)


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


def _moved(rollout: Rollout, moves: dict[Place, float], leaves: int = 0) -> Rollout:
    rows = {branch: rows.clone() for branch, rows in _rows(rollout).items()}
    for (branch, step, column), move in moves.items():
        rows[branch][step][column] += move
    return Rollout(replace(rollout.spec, rows=rows, leaves=leaves))


def _slopes(
    job: Job,
    rollout: Rollout,
    places: Sequence[Place],
    num_steps: int,
    base: Tensor,
    prompts: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Error ``[pictures, elements]`` on some prompts, and for each place its derivative by the
    coefficient, ``[places, pictures, elements]``."""
    here, found = Rollout(rollout.spec), []
    target = base.unflatten(0, (len(job.prompts), -1))[list(prompts)].flatten(0, 1)
    for start in range(0, len(places), TOGETHER):
        near = [
            _moved(rollout, {place: MOVE}, leaves=place[1])
            for place in places[start : start + TOGETHER]
        ]
        run_rollouts(job, [here, *near], None, num_steps, base=target, prompts=prompts)
        found += [(_error(other) - _error(here)) / MOVE for other in near]
    return _error(here), torch.stack(found)


def _step(error: Tensor, slopes: Tensor, damping: float) -> Tensor:
    """Gauss-Newton's step; damping is relative to the mean of the normal matrix's diagonal."""
    weights = 1 / error.square().sum(1, keepdim=True).clamp(min=1e-20)
    scaled = (slopes * weights).flatten(1)
    matrix, onto = scaled @ slopes.flatten(1).T, scaled @ error.flatten()
    pull = damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)
    return -torch.linalg.solve(matrix + pull, onto)


def _error(rollout: Rollout) -> Tensor:
    assert rollout.result.error is not None
    return rollout.result.error


def _rows(rollout: Rollout) -> Mapping[str, Tensor]:
    assert rollout.spec.rows is not None  # fixed
    return rollout.spec.rows
