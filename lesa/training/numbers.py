"""The numbers that `lesa.train` is asked for: steps, full steps, a budget, a target, ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lesa.core.checks import MOST_SEED, MOST_STEPS, shown, whole
from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.forecasters.guard import check_mode
from lesa.forecasters.target import Target
from lesa.training.budget import ENOUGH, Budget
from lesa.util.ranks import Ranks

BUDGETED = ("continuous", "table")  # forms whose training plans by a budget


def whole_numbers(name: str, value: int | Sequence[int]) -> list[int]:
    """One number or several, without repeats.

    Raises:
        LesaError: none, or one that is no whole number of at least 1.
    """
    listed: Any = [value]  # a tensor or an array of one number among them
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        listed = value if getattr(value, "shape", (1,)) else [value]
    numbers = [whole(name, number, 1, MOST_STEPS) for number in listed]
    if not numbers:
        raise LesaError(f"{name}={shown(value)}: no number; give one of at least 1, or several")
    return list(dict.fromkeys(numbers))


def check_counts(
    num_inference_steps: Sequence[int], full_steps: Sequence[int], form: str, listed: bool = False
) -> None:
    """LesaError where a form takes one count only, or more steps are to be full than there are;
    `listed` tells that they are those of a list, which fits its runs."""
    for name, counts in (("num_inference_steps", num_inference_steps), ("full_steps", full_steps)):
        if form == "paper" and len(counts) > 1:
            raise LesaError(
                f"{name}={counts}: form='paper' is tied to one step list; pass one number"
            )
    if listed:
        return
    if max(full_steps) > min(num_inference_steps):
        raise LesaError(
            f"full_steps={max(full_steps)} is more than num_inference_steps="
            f"{min(num_inference_steps)}: ask for fewer full steps"
        )
    if max(full_steps) == min(num_inference_steps):
        raise LesaError(
            f"full_steps={max(full_steps)} are all of num_inference_steps="
            f"{min(num_inference_steps)}, so that nothing would be forecast; ask for fewer"
        )


def checked_budget(budget: Any, form: str, guard: bool = False) -> Budget:
    """What training may cost, perhaps with the search for a guard; LesaError for a value that is
    none, or a form that keeps to none."""
    found = replace(Budget.parse(budget), guard=guard)
    if budget is not None and form not in BUDGETED:
        raise LesaError(
            f"budget={shown(budget)}: the training of form={form!r} has a fixed length and keeps "
            "to no budget; leave it out, or train with form='continuous'"
        )
    return found


def check_guard(guard: Any, form: str, prompts: int) -> None:
    """LesaError for an unknown way to guard, a form that has none, or too few prompts to tell which
    pictures are at risk."""
    check_mode(guard)
    if guard is None or guard == "off":
        return
    if form not in BUDGETED:
        raise LesaError(f"guard={guard!r}: form={form!r} has none; leave one of the two out")
    if prompts < ENOUGH:
        raise LesaError(
            f"guard={guard!r}: {prompts} prompts do not tell which pictures are at risk; give "
            f"{ENOUGH} or more"
        )


def check_seed(seed: int) -> int:
    """The seed; LesaError for one that noise sources do not take, or below 0."""
    return whole("seed", seed, 0, MOST_SEED)


def counts_of(schedule: Schedule, num_inference_steps: Sequence[int]) -> list[int]:
    """How many full steps a given list has in the first of the runs, in place of what was asked.

    Raises:
        LesaError: it is no step list, or one of other numbers of steps.
    """
    if not isinstance(schedule, Schedule):
        raise LesaError(
            f"schedule={shown(schedule)}: not a Schedule; give one such as lesa.Schedule.every(5)"
        )
    bound = [schedule.bind(count) for count in num_inference_steps]
    return [len(bound[0].full_steps)]


def check_at_least(least: int, **numbers: int) -> None:
    """LesaError for what is no whole number, or below the least."""
    for name, value in numbers.items():
        whole(name, value, least)


def check_ranks(ranks: Ranks, prompts: int, batch_size: int, form: str) -> None:
    """LesaError where a rank would have no batch of the plain run, or the form takes one process.

    What goes on after the plain run has fewer batches at some steps; it needs no more ranks.
    """
    if ranks.size == 1:
        return
    if form == "disca":
        raise LesaError(
            f"group={ranks.size} ranks: form='disca' is trained by one process; leave group out"
        )
    batches = -(-prompts // batch_size)
    if batches < ranks.size:
        smaller = f", or batch_size={prompts // ranks.size}" * (prompts >= ranks.size)
        raise LesaError(
            f"group={ranks.size} ranks: {prompts} prompts at batch_size={batch_size} are {batches} "
            f"batches, so that a rank would have none; give at most {batches} ranks{smaller}"
        )


def checked_target(
    target: float | None, form: str, schedule: Schedule | None, full_steps: Sequence[int]
) -> float | None:
    """The PSNR that is to be reached; LesaError for an impossible one, or where nothing is
    searched, or from several numbers of full steps."""
    if target is None:
        return None
    if len(full_steps) > 1:
        raise LesaError(
            f"full_steps={list(full_steps)}: with target_psnr={shown(target)} it is where the "
            "search begins; give one number, or leave target_psnr out"
        )
    if form in ("paper", "disca") or schedule is not None:
        other = f"form={form!r}" if schedule is None else "schedule=..."
        raise LesaError(
            f"target_psnr={shown(target)}: {other} calibrates one number of full steps; leave one "
            "of the two out"
        )
    return Target(psnr=target).psnr
