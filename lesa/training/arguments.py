"""The arguments of `lesa.train` that go on to the pipeline or to the forecaster, checked before it
runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lesa.core.checks import real, shown, whole
from lesa.errors import LesaError
from lesa.forecasters.settings import Settings
from lesa.hooks.pipeline import find_denoisers
from lesa.training.job import call_arguments, pipeline_arguments
from lesa.util.warn import warn

TRAINS = ("form", "tap")  # fields of the forecaster that are arguments of `lesa.train` itself
FIXED = {"output_type": "latent", "return_dict": False}  # of every call that training makes
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
