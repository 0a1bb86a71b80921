"""From statistics to calibrations: one per number of full steps, or what a target needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf

from lesa.core.schedule import Schedule
from lesa.forecasters import LesaForecaster
from lesa.forecasters.guard import Mode
from lesa.forecasters.worth import Worth
from lesa.training.budget import Budget, Shares
from lesa.training.calibrate import Calibrator
from lesa.training.collect import collect
from lesa.training.guard import Guarded, guarded
from lesa.training.job import Job
from lesa.training.search import Steps, shaped
from lesa.training.statistics import Statistics
from lesa.training.worth import judges, measure

TRIES = 4  # numbers of full steps that a search for a target takes, about

__all__ = ["Aim", "calibrate", "collect_all"]


@dataclass
class Aim:
    """What a training is to find, and what it may cost.

    Attributes:
        num_steps: numbers of steps.
        full_steps: numbers of full steps; where there is a target the search begins at the first.
        schedule: a step list that is calibrated instead of searching one.
        race: whether step lists race each other as accelerated runs.
        polish: rounds of the fit of all gaps together.
        budget: what all of it may cost.
        fill: whether fitted prompts, as many as the budget pays for, are judged beside few others.
        guard: what a picture at risk shall get, if that pays.
        target_psnr: dB that the 10th percentile of the pictures is to hold.
    """

    num_steps: Sequence[int]
    full_steps: Sequence[int]
    schedule: Schedule | None = None
    race: bool = True
    polish: int = 1
    budget: Budget = field(default_factory=Budget)
    target_psnr: float | None = None
    guard: Mode = "off"
    fill: bool = True


def collect_all(job: Job, aim: Aim, *, estimate: bool = True) -> list[Statistics]:
    """The plain runs at every number of steps; after the first batch says what the whole will
    cost, if it is to be estimated, and fixes a budget of seconds."""

    def told(seconds: float) -> None:
        each = seconds * sum(aim.num_steps) / aim.num_steps[0]
        prompts, counts, steps = len(job.prompts), aim.full_steps, aim.num_steps[0]
        aim.budget = aim.budget.known(each, prompts, len(judges(job)), counts, steps)
        if aim.target_psnr is None or aim.budget.generations is not None:
            job.progress.line(aim.budget.estimate(each, prompts, counts, steps))
        else:  # how many numbers are tried is not known
            tries = [counts[0]] * TRIES
            job.progress.line(aim.budget.estimate(each, prompts, tries, steps, "about"))

    first, *others = aim.num_steps
    return [
        collect(job, first, told if estimate else None),
        *(collect(job, steps) for steps in others),
    ]


def calibrate(
    job: Job,
    forecaster: LesaForecaster,
    collected: Sequence[Statistics],
    aim: Aim,
    stopped: bool = False,
) -> None:
    """Fit and store every list; an interrupt ends it with the best found so far, as where training
    was `stopped` before.

    What the statistics alone say is stored first. Raises KeyboardInterrupt where there is nothing
    to keep yet.
    """
    try:
        for statistics in collected:
            calibrator = Calibrator(job, forecaster, statistics)
            if stopped:
                _lists(calibrator, aim)
                continue
            if aim.target_psnr is not None:
                _reach(calibrator, aim, aim.target_psnr)
                continue
            for lists in _lists(calibrator, aim):
                _fit(calibrator, lists, aim)
    except KeyboardInterrupt:
        if not forecaster.calibrations:
            raise
        stopped = True
    if stopped:
        job.interrupted(forecaster.metadata)


def _lists(calibrator: Calibrator, aim: Aim) -> list[list[Steps]]:
    """Step lists for each number of full steps, which the forecaster holds as the statistics fit
    them."""
    if aim.schedule is not None:
        given = aim.schedule.bind(calibrator.statistics.num_steps).full_steps
        calibrator.store_open_loop(given)
        return [[given]]
    found = calibrator.job.ranks.told(calibrator.search(aim.full_steps))
    for lists in found:
        calibrator.store_open_loop(lists[0])
    return found


def _fit(calibrator: Calibrator, lists: Sequence[Steps], aim: Aim) -> Worth | None:
    """The best of some lists of one number of full steps, as accelerated runs show it."""
    job, steps = calibrator.job, calibrator.statistics.num_steps
    prompts, spent = len(job.prompts), job.spent
    counts = TRIES if aim.target_psnr is not None else len(aim.full_steps)
    share = aim.budget.per_prompt(len(lists[0]), counts, steps, prompts)
    guarding = aim.budget.guarding(len(lists[0]), steps)
    if aim.target_psnr is not None:
        share = min(share, _left(job, aim) / prompts - guarding)
    work = Shares.of(share * steps * prompts, prompts, len(judges(job)), len(lists[0]))
    leaders = calibrator.race(lists, work.race) if aim.race else lists
    rollout = calibrator.fit(leaders, work.fit)
    calibrator.store(rollout)
    fitted = job.spent
    rollout = calibrator.insured(rollout, [*leaders, *lists], work.joint)
    rest = work.joint - (job.spent - fitted) * steps
    rollout, found = calibrator.joint_fit(rollout, aim.polish, rest), Guarded()
    if aim.guard != "off":
        calibrator.store(rollout)
        found = guarded(calibrator, rollout, lists, aim.guard)
    left = (share + guarding) * prompts - (job.spent - spent)
    each = max(len(r.spec.schedule.full_steps) for r in (rollout, *found.others.values()))
    beside = int(left * steps / each) - len(judges(job)) if aim.fill else 0
    worth = job.ranks.told(measure(job, rollout, found.others, job.ranks.told(beside)))
    calibrator.store(rollout, worth, found.guard)
    calibrator.tell(rollout, worth)
    return worth


def _reach(calibrator: Calibrator, aim: Aim, target: float) -> None:
    """Calibrate numbers of full steps until the smallest one that holds the target is known; those
    that do not hold it are forgotten, unless none does."""
    steps, found = calibrator.statistics.num_steps, dict[int, float]()
    for count in _guesses(calibrator, aim.full_steps[0], target, found):
        prompts = len(calibrator.job.prompts)
        runs = (prompts + len(judges(calibrator.job))) * count / steps
        runs += prompts * aim.budget.guarding(count, steps)
        if found and runs > _left(calibrator.job, aim):
            break
        lists = calibrator.job.ranks.told(calibrator.search([count]))[0]
        calibrator.store_open_loop(lists[0])
        worth = _fit(calibrator, lists, aim)
        found[count] = float("-inf") if worth is None else worth.p10
    holding = [count for count, p10 in found.items() if p10 >= target]
    for count in found if holding else ():
        if count not in holding:
            calibrator.forget(count)
    best = min(holding) if holding else max(found, key=found.__getitem__)
    told = "holds" if holding else "is the nearest to"
    calibrator.job.progress.line(
        f"target: {best} of {steps} steps in full {told} {target:g} dB at p10 ({found[best]:.1f})"
    )


def _left(job: Job, aim: Aim) -> float:
    """Plain generations that the budget has left, without a bound if there is none."""
    if aim.budget.generations is None:
        return inf
    return aim.budget.generations - job.spent


def _guesses(
    calibrator: Calibrator, first: int, target: float, found: dict[int, float]
) -> Iterator[int]:
    """Numbers of full steps to try, while the caller enters what they reach into ``found``.

    What the statistics say of the prior's lists tells how many dB a step more is worth.
    """
    statistics, judge = calibrator.statistics, calibrator.judge
    steps = statistics.num_steps
    low, high, guess = 1, steps - 1, min(first, steps - 1)
    expected = {n: judge.quality(shaped(n, statistics)[0]) for n in range(1, steps)}
    while low <= high:
        yield guess
        low, high = (low, guess - 1) if found[guess] >= target else (guess + 1, high)
        missing = target - found[guess] + expected[guess]
        guess = next((n for n in range(low, high) if expected[n] >= missing), high)
