"""Few-step models: all coefficients together, on the final latent.

The closed loop fits one step after the other, each to its own target. Where a run has so few steps
that every coefficient can be moved on its own, Gauss-Newton on true accelerated runs sees how the
steps' errors add up or cancel, and what the model itself makes of them at later full steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lesa.training.closed_loop import run_lanes
from lesa.training.job import Job
from lesa.training.lane import FixedLane, Lane, quality

LONGEST = 8  # steps of a run that is polished: it takes an accelerated run per coefficient
MOVE = 0.02  # of a coefficient, for its derivative
DAMPING = 1e-3  # relative to the mean of the normal matrix's diagonal
TOGETHER = 8  # lanes in one call
STEPS = (1.0, 0.5, 0.25)  # shares of a Gauss-Newton step that race

Place = tuple[str, int, int]  # branch, step, column


def polish(job: Job, lane: Lane, num_steps: int, rounds: int = 2) -> Lane:
    """A lane whose final latents are nearer to the base run's, or the same lane.

    Minimises sum_p log |x_T - x_T^base|^2 over pictures, that is their mean dB: Gauss-Newton with
    each picture weighted by the inverse of its own squared error. What races is then judged like
    all lanes, by mean and worst decile.
    """
    best = FixedLane.of(lane)
    places = _places(best)
    if not places:
        return lane
    _run(job, [best], num_steps)
    for _ in range(rounds):
        moved = [_moved(best, {place: MOVE}) for place in places]
        _run(job, moved, num_steps)
        step = _step(best, moved)
        tried = [_moved(best, dict(zip(places, (t * step).tolist(), strict=True))) for t in STEPS]
        _run(job, tried, num_steps)
        leader = max([best, *tried], key=quality)
        if leader is best:
            break
        best = leader
    return best if lane.score is None or quality(best) > quality(lane) else lane


def _places(lane: FixedLane) -> list[Place]:
    """Every coefficient that a skipped step may have."""
    found = []
    for branch, rows in lane.rows.items():
        latent = [rows.shape[1] - 1] if lane.uses_latent else []
        for step in lane.schedule.skipped_steps:
            held = len(lane.schedule.cached_before(step, lane.history))
            found += [(branch, step, column) for column in [*range(held), *latent]]
    return found


def _moved(lane: FixedLane, moves: dict[Place, float]) -> FixedLane:
    rows = {branch: rows.clone() for branch, rows in lane.rows.items()}
    for (branch, step, column), move in moves.items():
        rows[branch][step, column] += move
    return replace(lane, rows=rows)


def _run(job: Job, lanes: Sequence[FixedLane], num_steps: int) -> None:
    for start in range(0, len(lanes), TOGETHER):
        run_lanes(job, lanes[start : start + TOGETHER], None, num_steps)


def _step(here: FixedLane, moved: Sequence[FixedLane]) -> Tensor:
    """Gauss-Newton's step from the errors of the final latents, ``[pictures, elements]`` each."""
    error = _error(here)
    weights = 1 / error.square().sum(1, keepdim=True).clamp(min=1e-20)
    slopes = torch.stack([(_error(lane) - error) / MOVE for lane in moved])  # [n, pictures, D]
    scaled = (slopes * weights).flatten(1)
    matrix, onto = scaled @ slopes.flatten(1).T, scaled @ error.flatten()
    damping = DAMPING * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)
    return -torch.linalg.solve(matrix + damping, onto)


def _error(lane: Lane) -> Tensor:
    assert lane.error is not None
    return lane.error
