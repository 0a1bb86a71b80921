"""`lesa generate`: pictures of prompts, plain or accelerated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

from rich.console import Console

from lesa.cli.calls import check_one_each, full_steps_of
from lesa.cli.inputs import load_forecaster
from lesa.cli.launch import check_ranks
from lesa.cli.make_pictures import make_pictures
from lesa.cli.manifest import Manifest, run_key
from lesa.cli.output import check_json, say
from lesa.cli.pictures import NO_VIDEO, can_write_videos
from lesa.cli.requests import GenerateRequest
from lesa.core.schedule import Schedule, check_count
from lesa.errors import LesaError
from lesa.util.files import require_writable
from lesa.util.progress import Progress
from lesa.util.ranks import joined

_GIVE = "give either --full-steps or --interval, or what shall be reached, as --target-speedup 4"


def run_generate(request: GenerateRequest, console: Console) -> dict[str, Any]:
    """Save a picture of every prompt that has none yet, print what it took and return all of it.

    Under torchrun or `accelerate launch` every process makes whole batches of its own.

    Raises: LesaError for bad input, before the pipeline is loaded where it can be told.
    """
    texts = request.texts()
    check_ranks(len(texts), request.batch_size, request.device)
    checked = _checked(request)
    with joined() as ranks:
        with Progress(quiet=not ranks.leads).bar("load", 0):
            pipe = _loaded(request, texts, *checked)
        forecaster, settings, cache = checked
        told = _told(request, settings, cache, pipe)
        manifest = Manifest(request.out, run_key(pipe, forecaster, told), ranks.rank)
        facts = make_pictures(pipe, texts, settings, request, forecaster, cache, ranks, manifest)
    if ranks.leads:
        _tell(facts, len(texts), request, console)
    return facts | asdict(request.full_step)


def _checked(request: GenerateRequest) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The forecaster, the arguments of the pipeline's call and those of `lesa.enable`."""
    saved = request.saved()
    forecaster = load_forecaster(request.forecaster) if request.forecaster else None
    steps = request.num_inference_steps
    settings = request.settings(saved, forecaster, num_inference_steps=steps)
    check_one_each(settings, "generate makes")
    steps = settings["num_inference_steps"]
    cache = checked_schedule(forecaster, request.full, steps)
    cache |= _guarded(forecaster, request, cache.get("full_steps"))
    request.check_target()
    require_writable(request.out)
    check_json(request.json)
    Manifest(request.out).read()
    return forecaster, settings, cache


def _loaded(
    request: GenerateRequest,
    texts: list[str],
    forecaster: Any,
    settings: dict[str, Any],
    _cache: Mapping[str, Any],
) -> Any:
    """The pipeline, ready to be called."""
    pipe = request.load(settings, texts, forecaster)
    request.full_step.warm_up(pipe, texts[: request.batch_size], settings)
    return pipe


def _told(
    request: GenerateRequest, settings: Mapping[str, Any], cache: Mapping[str, Any], pipe: Any
) -> dict[str, Any]:
    """What was asked for that pixels depend on."""
    made = request.recipe.preparation
    return {
        "pipeline": request.named,
        "settings": dict(settings),
        "cache": dict(cache),
        "device": pipe.device.type,
        "dtype": str(pipe.dtype),
        "fps": request.fps,
        "prepared": [dict(made.lora), made.vae_tiling, made.vae_slicing],
        **asdict(request.full_step),
    }


def checked_schedule(forecaster: Any, asked: Mapping[str, Any], num_steps: int) -> dict[str, Any]:
    """Arguments of `lesa.enable` that say which steps are full.

    A forecaster that was trained has its own numbers, of which `full_steps_of` takes one.

    Args:
        asked: of full_steps, interval, target_speedup, target_psnr and quality what was given.

    Raises: LesaError where several are given, none without such a number, one without a
        forecaster, or one that the forecaster cannot reach.
    """
    given = [f"{name.replace('_', '-')}={value}" for name, value in asked.items()]
    if forecaster is None:
        if given:
            raise LesaError(
                f"{given[0]}: it needs a forecaster; give --forecaster too, a folder or a method "
                "such as lesa-untrained"
            )
        return {}
    asked = asked or {"full_steps": full_steps_of(forecaster, num_steps)}
    if len(given) > 1:
        raise LesaError(f"{given[0]}: {given[1]} says something else; {_GIVE}")
    ((name, value),) = asked.items()
    if value is None:
        raise LesaError(f"full-steps=None: nothing says which steps are full; {_GIVE}")
    if name == "interval":
        return {"schedule": Schedule.every(value).bind(num_steps)}
    if name == "full_steps":
        check_count(value, num_steps, "full-steps")
    else:
        _check_reach(forecaster, asked, num_steps)
    return dict(asked)


def _guarded(forecaster: Any, request: GenerateRequest, count: int | None) -> dict[str, str]:
    """The argument of `lesa.enable` for a guard, if one was asked for; LesaError where there is
    none, or none for this number of full steps."""
    if request.guard is None:
        return {}
    from lesa.engine.config import LesaConfig

    if forecaster is None:
        raise LesaError(f"guard={request.guard!r}: it needs a forecaster; give --forecaster too")
    LesaConfig(forecaster, guard=cast(Any, request.guard))  # which checks it
    entries = getattr(forecaster, "calibrations", ())
    guarded = [e for e in entries if e.guard and e.guard.kind == request.guard]
    known = {len(e.schedule.full_steps) for e in guarded}
    if known and count is not None and count not in known:
        listed = ", ".join(map(str, sorted(known, reverse=True)))
        raise LesaError(
            f"guard={request.guard!r}: only {listed} full steps have it, not {count}; choose from "
            "these, or leave guard out"
        )
    return {"guard": request.guard}


def _check_reach(forecaster: Any, asked: Mapping[str, Any], num_steps: int) -> None:
    """LesaError, in the words of the options, for a target that no list reaches."""
    from lesa.engine.config import LesaConfig

    try:
        LesaConfig(forecaster, **asked).bound_schedule(num_steps)
    except LesaError as error:
        told = re.sub(r"\b(target|full)_(speedup|psnr|steps)\b", r"\1-\2", str(error))
        raise LesaError(told) from None


def _tell(
    facts: Mapping[str, Any],
    count: int,
    request: GenerateRequest,
    console: Console,
) -> None:
    """What was made and how: also what was taken from the forecaster without being asked for."""
    what = ("video" if facts["video"] else "picture") + "s" * (count > 1)
    steps = facts["settings"]["num_inference_steps"]
    full = len((facts["stats"] or {}).get("full_steps", ())) or steps
    told = (
        f"{count} {what} in {request.out}, {facts['seconds']:.3g} s of denoising,"
        f" {full} of {steps} steps in full"
    )
    if facts["made"] < count:
        told = f"{count} {what} in {request.out}, of which {count - facts['made']} were there"
    say(console, told)
    if facts["video"] and not can_write_videos():
        say(console, NO_VIDEO)
    if facts["stats"]:
        say(console, facts["summary"])
