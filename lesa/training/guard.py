"""A guard for a fitted list: whether one pays, tried on the calibration prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import inf
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.forecasters.calibration import Calibration
from lesa.forecasters.guard import Guard, Kind
from lesa.training.budget import EXTRA
from lesa.training.calibrate import Calibrator
from lesa.training.closed_loop import run_rollouts, steps_computed
from lesa.training.job import Job
from lesa.training.objective import objective
from lesa.training.rollout import Rollout
from lesa.training.search import Steps

__all__ = ["Guarded", "guarded"]

MOST = {"route": 0.5, "spend": 0.25}  # share of the pictures that may be at risk
GAIN = 0.2  # dB of the objective on pictures that the limit was not chosen on
NO_ROOM = {
    "route": "no other list begins with the same two full steps",
    "spend": "no step is skipped behind the second full one",
}


class Guarded(NamedTuple):
    """A guard, if one pays, and by its number for each prompt at risk the rollout that it
    follows."""

    guard: Guard | None = None
    others: Mapping[int, Rollout] = MappingProxyType({})


def guarded(calibrator: Calibrator, leader: Rollout, lists: Sequence[Steps], kind: Kind) -> Guarded:
    """The guard of a fitted rollout, or none, with a line that says why, where none pays.

    It decides at the second full step. What it would run instead is tried on all prompts, beside
    the list itself. The limit is the one with the best objective on them; it pays where every
    picture, judged by the limit that is best for the others, gives `GAIN` more than chance: than as
    many pictures, taken at random, or none.

    Args:
        calibrator: of the step count.
        leader: the fitted list.
        lists: lists of as many full steps, of which "route" takes one.
        kind: what a picture at risk gets.
    """
    job, here = calibrator.job, leader.fixed()
    other = _routed(calibrator, here, lists) if kind == "route" else _spent(here)
    if other is None:
        return _without(job, kind, NO_ROOM[kind])
    new = [here] if other.result.score is not None else [here, other]
    with job.phase("guard", job.rows(steps_computed(new))) as bar:
        bar.detail = f"{len(job.prompts)} prompts, {kind}"
        run_rollouts(job, new, None, here.spec.schedule.steps)
    risk, scores, others = here.result.change, here.result.score, other.result.score
    assert risk is not None and scores is not None and others is not None  # they have run
    risk = job.ranks.told(risk.cpu().double())
    limit, gain = job.ranks.told(choose(risk, scores, others, MOST[kind]))
    if limit is None or gain < GAIN:
        told = f"it would gain {gain:.2f} dB on pictures that its limit was not chosen on"
        return _without(job, kind, f"{told}, and {GAIN:g} is the least that counts")
    above = risk > limit
    kept = other.result.stored() if kind == "route" else {}
    rows = {branch: shared for branch, (shared, _) in kept.items()}
    split = {branch: parts for branch, (_, parts) in kept.items() if parts is not None}
    step, share = here.spec.schedule.full_steps[1], float(above.double().mean())
    guard = Guard(step, limit, other.spec.schedule, rows, split, share)
    at_risk = [i for i in range(len(job.prompts)) if bool(above[job.pictures_of([i])].any())]
    _tell(job, guard, here.spec.schedule, f"{int(above.sum())} of {len(above)} pictures", gain)
    return Guarded(guard, {i: other for i in at_risk})


def choose(risk: Tensor, scores: Tensor, others: Tensor, most: float) -> tuple[float | None, float]:
    """The limit of the risk above which pictures had better take the other scores, None where none
    is better than nobody; and what the signal gains in dB of the objective.

    Each picture is judged by the limit that is best for all others, and the whole by what as many
    pictures taken at random would have given, or none: further full steps serve any picture.
    """
    limit = _best(risk, scores, others, most)
    blind, taken = scores.clone(), 0
    everyone = torch.arange(len(risk))
    for picture in everyone.tolist():
        rest = everyone != picture
        found = _best(risk[rest], scores[rest], others[rest], most)
        if found is not None and risk[picture] > found:
            blind[picture] = others[picture]
            taken += 1
    share = taken / len(risk)
    weights = torch.tensor([1 - share, share]).repeat_interleave(len(risk))
    chance = objective(torch.cat([scores, others]), weights)
    return limit, objective(blind) - max(chance, objective(scores))


def _best(risk: Tensor, scores: Tensor, others: Tensor, most: float) -> float | None:
    """The best limit, in the middle between two risks."""
    order = risk.argsort(descending=True)
    mixed, best, found = scores.clone(), objective(scores), None
    for picture, after in pairwise(order[: 1 + int(most * len(risk))].tolist()):
        mixed[picture] = others[picture]
        gain = objective(mixed)
        if gain > best and inf > risk[picture] > risk[after]:  # inf: of a feature of zeros
            best, found = gain, float(risk[picture] + risk[after]) / 2
    return found


def _routed(calibrator: Calibrator, here: Rollout, lists: Sequence[Steps]) -> Rollout | None:
    """The list with the same second full step that complements this one best, fitted: which, if
    every picture took the better of the two, is told by the statistics."""
    own, judge = here.spec.schedule.full_steps, calibrator.judge
    alike = [steps for steps in lists if steps[:2] == own[:2] and steps != own]
    if not alike:
        return None
    scores = judge.scores(own)
    best = max(alike, key=lambda steps: objective(np.maximum(scores, judge.scores(steps))))
    return calibrator.fit([best], 0)


def _spent(here: Rollout) -> Rollout | None:
    """The list with further full steps, whose features no forecast weighs."""
    spec, schedule = here.spec, with_extra(here.spec.schedule)
    if schedule is None:
        return None
    rows, history = {}, spec.history
    for branch, kept in (spec.rows or {}).items():
        entry = Calibration(spec.schedule, (), {branch: kept})
        moved = entry.extended_to(schedule, branch, spec.history)
        if moved is None:
            return None
        rows[branch] = moved[0]
        history = spec.history + moved[0].shape[1] - kept.shape[1]
    return Rollout(replace(spec, schedule=schedule, history=history, rows=rows, shared={}))


def with_extra(schedule: Schedule, place: int = 1) -> Schedule | None:
    """A list with `EXTRA` full steps more, each in the middle of one of the gaps that follow one of
    its own, the second where nothing is said; None where there are none to fill."""
    ends = [*schedule.full_steps[place:], schedule.steps]
    gaps = [(low, high) for low, high in pairwise(ends) if high - low > 1][:EXTRA]
    added = [(low + high) // 2 for low, high in gaps]
    return Schedule.explicit([*schedule.full_steps, *added], schedule.steps) if added else None


def _tell(job: Job, guard: Guard, guarded: Schedule, whose: str, gain: float) -> None:
    """Say what a guard does, and to whom."""
    extra = guard.extra_steps(guarded)
    does = "more full steps" if extra else "other full steps"
    steps = ", ".join(map(str, extra or guard.schedule.full_steps))
    job.progress.line(
        f"guard: {guard.kind}, {does} ({steps}) for pictures at risk: those that change by more "
        f"than {guard.limit:.3g} of their size up to full step {guard.step}, {whose} here; "
        f"{gain:+.2f} dB on pictures that this limit was not chosen on"
    )


def _without(job: Job, kind: Kind, why: str) -> Guarded:
    job.progress.line(f"guard={kind!r}: none, since {why}")
    return Guarded()
