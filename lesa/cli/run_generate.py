"""`lesa generate`: pictures of prompts, plain or accelerated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from math import ceil
from typing import Any

from rich.console import Console

from lesa.cli.calls import full_steps_of
from lesa.cli.inputs import load_forecaster
from lesa.cli.output import check_json, say
from lesa.cli.pictures import NO_VIDEO, can_write_videos, file_name, save
from lesa.cli.requests import GenerateRequest
from lesa.cli.saved import look_at
from lesa.core.schedule import Schedule, check_count
from lesa.errors import LesaError
from lesa.util.files import require_writable
from lesa.util.progress import Progress

_GIVE = "give either --full-steps or --interval, or what shall be reached, as --target-speedup 4"


def run_generate(request: GenerateRequest, console: Console) -> dict[str, Any]:
    """Save a picture of every prompt, print what it took and return all of it.

    Raises: LesaError for bad input, before the pipeline is loaded where it can be told.
    """
    texts = request.texts()
    with Progress().bar("load", 0):
        pipe, settings, forecaster, cache = _prepare(request, texts)
    facts = make_pictures(pipe, texts, settings, request, forecaster, cache)
    _tell(facts, len(texts), request, console)
    return facts | asdict(request.full_step)


def _prepare(
    request: GenerateRequest, texts: list[str]
) -> tuple[Any, dict[str, Any], Any, dict[str, Any]]:
    """The pipeline, the arguments of its call, the forecaster and those of `lesa.enable`."""
    saved = look_at(request.named)
    forecaster = load_forecaster(request.forecaster) if request.forecaster else None
    steps = request.num_inference_steps
    settings = request.settings(saved, forecaster, num_inference_steps=steps)
    steps = settings["num_inference_steps"]
    cache = checked_schedule(forecaster, request.full, steps)
    request.check_target()
    require_writable(request.out)
    check_json(request.json)
    pipe = request.load(settings, texts, forecaster)
    request.full_step.warm_up(pipe, texts[: request.batch_size], settings)
    return pipe, settings, forecaster, cache


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
            raise LesaError(f"{given[0]}: it needs a forecaster; give --forecaster too")
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


def _check_reach(forecaster: Any, asked: Mapping[str, Any], num_steps: int) -> None:
    """LesaError, in the words of the options, for a target that no list reaches."""
    from lesa.engine.config import LesaConfig

    try:
        LesaConfig(forecaster, **asked).bound_schedule(num_steps)
    except LesaError as error:
        told = re.sub(r"\b(target|full)_(speedup|psnr|steps)\b", r"\1-\2", str(error))
        raise LesaError(told) from None


def make_pictures(
    pipe: Any,
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    request: GenerateRequest,
    forecaster: Any,
    cache: Mapping[str, Any],
) -> dict[str, Any]:
    """Generate in batches and save each batch at once, so that an interrupt loses one at most.

    Args:
        forecaster: What skips steps, None for a plain run.
        cache: Arguments of `lesa.enable` beside it; empty for a plain run.
    """
    from lesa.api import accelerate, stats
    from lesa.hooks.timed_run import generate

    files, seconds, counters, moving = [], 0.0, None, False
    work = ceil(len(prompts) / request.batch_size) * settings["num_inference_steps"]
    with (
        Progress().bar("generate", work) as bar,
        accelerate(pipe, forecaster, **cache) if cache else nullcontext(),
    ):
        for start in range(0, len(prompts), request.batch_size):
            chunk = prompts[start : start + request.batch_size]
            seeds = range(request.seed + start, request.seed + start + len(chunk))
            run = generate(pipe, chunk, seeds, settings, on_step=bar.advance)
            seconds += run.seconds
            moving = run.images.ndim == 5
            for row, (prompt, image) in enumerate(zip(chunk, run.images, strict=True)):
                files += save(image, request.out, file_name(start + row, prompt), request.fps)
        if cache:
            counters = stats(pipe)
    return {
        "files": files,
        "seconds": seconds,
        "settings": dict(settings),
        "scheduler": type(pipe.scheduler).__name__,
        "video": moving,
        "stats": counters.to_dict() if counters else None,
        "summary": str(counters) if counters else "plain run",
    }


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
    say(console, told)
    if facts["video"] and not can_write_videos():
        say(console, NO_VIDEO)
    if facts["stats"]:
        say(console, facts["summary"])
