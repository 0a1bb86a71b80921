"""The arguments of `lesa.train`, sorted and checked before the pipeline runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lesa.core.checks import MOST_SEED, MOST_STEPS, real, shown, whole
from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.forecasters.settings import Settings
from lesa.forecasters.target import Target
from lesa.hooks.pipeline import find_denoisers
from lesa.hooks.prompt_inputs import count_prompts
from lesa.training.budget import ENOUGH, Budget, quarter
from lesa.training.job import call_arguments, pipeline_arguments
from lesa.util.ranks import Ranks
from lesa.util.warn import warn

TRAINS = ("form", "tap")  # fields of the forecaster that are arguments of `lesa.train` itself
FIXED = {"output_type": "latent", "return_dict": False}  # of every call that training makes
BUDGETED = ("continuous", "table")  # forms whose training plans by a budget
TOLD = ("branches", "num_steps")  # those that the pipeline's own runs tell
FIELDS = tuple(field.name for field in fields(Settings) if field.name not in (*TRAINS, *TOLD))


def check_pipe(pipe: Any, prompts: Any) -> None:
    """LesaError for what is no pipeline with a denoiser, or takes none of the given prompts."""
    if isinstance(pipe, type) or not callable(pipe) or not hasattr(pipe, "scheduler"):
        raise LesaError(f"pipe={shown(pipe)}: not a diffusers pipeline with a scheduler; give one")
    find_denoisers(pipe)
    if prompts is not None and "prompt" not in pipeline_arguments(pipe):
        raise LesaError(
            f"prompts={shown(prompts)}: {type(pipe).__name__} takes none; pass prompts=None and "
            "what it takes in call="
        )


def sorted_arguments(
    pipe: Any,
    call: Mapping[str, Any] | None,
    settings: Mapping[str, Any] | None,
    more: Mapping[str, Any],
    steps: Sequence[int] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``pipe(...)`` is called with, and the fields of the forecaster.

    ``more`` may hold both; its values come before those of ``call`` and ``settings``. ``steps`` are
    the numbers of steps to train for.

    Raises:
        LesaError: a name that the pipeline, or the forecaster, does not know, or a value that
            training cannot pass.
    """
    for name, given in (("call", call), ("settings", settings)):
        if given is not None and not isinstance(given, Mapping):
            raise LesaError(f"{name}={shown(given)}: not a dict; give arguments by their names")
        for key in given or ():
            if not isinstance(key, str):
                raise LesaError(f"{name}={shown(given)}: {shown(key)} is no name; give texts")
    taken, wrong = call_arguments(pipe, dict(call or {}))
    for name, value in wrong.items():
        raise LesaError(f"{_told('call', name, value)}; {_remedy(pipe, name)}")
    chosen = dict(settings or {})
    for name, value in chosen.items():
        if name not in FIELDS:
            raise LesaError(f"{_told('settings', name, value)}; {_remedy(pipe, name)}")
    of_pipe, of_forecaster = call_arguments(pipe, dict(more))
    for name, value in of_forecaster.items():
        if name not in FIELDS:
            raise LesaError(
                f"{name}={shown(value)}: neither an argument of {type(pipe).__name__} nor a field "
                f"of the forecaster; {_remedy(pipe, name)}"
            )
    taken |= of_pipe
    _check_steps(taken, steps)
    taken.pop("num_inference_steps", None)  # an argument of `lesa.train` itself
    if "generator" in taken:
        raise LesaError(
            "generator=...: training makes a noise source for every picture; drop it and pass seed="
        )
    _check_call(pipe, taken)
    return taken, chosen | of_forecaster


def _check_steps(call: Mapping[str, Any], steps: Sequence[int]) -> None:
    """LesaError for prompts, an argument of `lesa.train` itself, or noise levels for other
    numbers of steps; a warning for a number of steps, which is one too."""
    told = call.get("num_inference_steps")
    if told is not None and steps and told not in steps:
        warn(
            f"num_inference_steps={shown(told)}: it stands in call= and is not used, since "
            f"{list(steps)} is trained for; pass num_inference_steps= to lesa.train itself"
        )
    if call.get("prompt") is not None:
        raise LesaError("prompt=...: it stands in call=; pass prompts to lesa.train itself")
    sigmas = call.get("sigmas")
    if sigmas is not None and hasattr(sigmas, "__len__") and any(len(sigmas) != n for n in steps):
        raise LesaError(
            f"sigmas={shown(sigmas)}: {len(sigmas)} values for num_inference_steps={list(steps)}; "
            "give as many as there are steps"
        )


def _check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """LesaError for what training sets itself, and for no number where the pipeline wants one."""
    for name, value in FIXED.items():
        if name in call and call[name] != value:
            raise LesaError(f"{name}={shown(call[name])}: training needs {value!r}; leave it out")
    try:
        hints = get_type_hints(type(pipe).__call__)
    except (NameError, TypeError):  # annotations that only a type checker can read
        return
    for name, value in call.items():
        hint = hints.get(name)
        several = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
        kinds = {*several} - {NoneType}
        if value is None or not kinds <= {int, float}:
            continue
        if kinds == {int}:
            sized = name in ("height", "width") or name.startswith("num_")
            whole(name, value, 1 if sized else 0)
        else:
            real(name, value, "give a number")


def checked_settings(form: str, tap: str, chosen: Mapping[str, Any]) -> None:
    """Try the fields of the forecaster, so that a wrong value is told before any work.

    Raises:
        LesaError: a field has an impossible value.
    """
    Settings(**{**chosen, "form": form, "tap": tap})


def checked_prompts(prompts: Iterable[str] | None, call: Mapping[str, Any]) -> list[str]:
    """The prompts, or titles for the embeddings in ``call``.

    Raises:
        LesaError: there are none, or one is empty or no string.
    """
    if prompts is None:
        return [f"embedding {row}" for row in range(count_prompts(call))]
    return _texts("prompts", prompts)


def _texts(name: str, given: Any) -> list[str]:
    several = isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping))
    texts = list(given) if several else []
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        told = shown(texts if several else given)
        other = "give some, or how many to hold out"
        remedy = "pass 8 to 32 prompts" if name == "prompts" else other
        raise LesaError(f"{name}={told}: not a list of non-empty strings; {remedy}")
    return texts


def held_out(
    validation: Iterable[str] | int | None, texts: Sequence[str], call: Mapping[str, Any]
) -> tuple[list[str], frozenset[int]]:
    """All prompts, and the numbers of those that nothing is fitted to: every fourth of at least
    `ENOUGH` where nothing is said.

    Raises:
        LesaError: fewer prompts than are to be held out, or validation prompts beside embeddings.
    """
    count = len(texts)
    if validation is None:
        if count < ENOUGH:
            warn(
                f"{count} prompts are too few to hold some out, so that lists are chosen on those "
                f"that were fitted; give {ENOUGH} prompts, or validation="
            )
        return [*texts], frozenset(range(3, count, 4) if quarter(count) else ())
    if getattr(validation, "ndim", 1) == 0 or not isinstance(validation, Iterable):  # a number
        validation = whole("validation", validation, 0)
        if validation and count - validation < 2:
            raise LesaError(
                f"validation={validation}: of {count} prompts {max(0, count - validation)} would "
                f"be left to fit; hold out at most {max(0, count - 2)}, or give more prompts"
            )
        places = [round((i + 1) * count / validation) - 1 for i in range(validation)]
        return [*texts], frozenset(places)
    if "prompt_embeds" in call:
        raise LesaError(
            f"validation={shown(validation)}: prompts are given as embeddings; say how many of "
            "their rows are to be held out"
        )
    more = _texts("validation", validation)
    both = sum(text in set(texts) for text in more)
    if both:
        raise LesaError(
            f"validation={shown(more)}: {both} of its prompts are fitted too, and tell nothing of "
            "others; give prompts that are not among those to fit, or a number of them to hold out"
        )
    return [*texts, *more], frozenset(range(count, count + len(more)))


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


def check_counts(num_inference_steps: Sequence[int], full_steps: Sequence[int], form: str) -> None:
    """LesaError where more steps are to be full than there are, or a form takes one count only."""
    for name, counts in (("num_inference_steps", num_inference_steps), ("full_steps", full_steps)):
        if form == "paper" and len(counts) > 1:
            raise LesaError(
                f"{name}={counts}: form='paper' is tied to one step list; pass one number"
            )
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


def checked_budget(budget: Any, form: str) -> Budget:
    """What training may cost; LesaError for a value that is none, or a form that keeps to none."""
    found = Budget.parse(budget)
    if budget is not None and form not in BUDGETED:
        raise LesaError(
            f"budget={shown(budget)}: the training of form={form!r} has a fixed length and keeps "
            "to no budget; leave it out, or train with form='continuous'"
        )
    return found


def check_seed(seed: int) -> int:
    """The seed; LesaError for one that noise sources do not take, or below 0."""
    return whole("seed", seed, 0, MOST_SEED)


def check_schedule(schedule: Schedule | None, num_inference_steps: Sequence[int]) -> None:
    """LesaError for what is no step list, or one of other numbers of steps."""
    if schedule is None:
        return
    if not isinstance(schedule, Schedule):
        raise LesaError(
            f"schedule={shown(schedule)}: not a Schedule; give one such as lesa.Schedule.every(5)"
        )
    for count in num_inference_steps:
        schedule.bind(count)


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


def _told(where: str, name: str, value: Any) -> str:
    what = "argument of the pipeline" if where == "call" else "field of the forecaster"
    return f"{name}={shown(value)}: no {what}, but it stands in {where}="


def _remedy(pipe: Any, name: str) -> str:
    """Where a name belongs, or the known one that is most like it."""
    parameters = list(pipeline_arguments(pipe))
    if name in TRAINS:
        return f"pass {name}= to lesa.train itself"
    if name in TOLD:
        return "leave it out, the pipeline's own runs tell it"
    if name in parameters:
        return "pass it in call="
    if name in FIELDS:
        return "pass it in settings="
    near = get_close_matches(name, [*parameters, *FIELDS], 1)
    return f"did you mean {near[0]}?" if near else "drop or correct it"
