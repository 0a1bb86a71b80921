"""`lesa generate`: pictures of prompts, plain or accelerated."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from rich.console import Console
from torch import Tensor

from lesa.cli.inputs import load_forecaster
from lesa.cli.output import check_json
from lesa.cli.requests import GenerateRequest
from lesa.core.schedule import Schedule, check_count
from lesa.errors import LesaError
from lesa.util.files import require_writable, write_atomically


def run_generate(request: GenerateRequest, console: Console) -> dict[str, Any]:
    """Save a picture of every prompt, print what it took and return all of it.

    Raises: LesaError for bad input, before the pipeline is loaded where it can be told.
    """
    texts = request.texts()
    settings = request.settings(request.pipeline, num_inference_steps=request.num_inference_steps)
    steps = settings["num_inference_steps"]
    cache = checked_schedule(request.forecaster, request.full_steps, request.interval, steps)
    request.check_target(request.pipeline)
    require_writable(request.out)
    check_json(request.json)
    forecaster = load_forecaster(request.forecaster) if request.forecaster else None
    pipe = request.load(request.pipeline)
    request.full_step.warm_up(pipe, texts[: request.batch_size], settings)
    facts = make_pictures(pipe, texts, settings, request, forecaster, cache)
    console.print(f"{len(texts)} pictures in {request.out}, {facts['seconds']:.3g} s of denoising")
    if facts["stats"]:
        console.print(facts["summary"])
    return facts | asdict(request.full_step)


def checked_schedule(
    forecaster: str | None, full_steps: int | None, interval: int | None, num_steps: int
) -> dict[str, Any]:
    """Arguments of `lesa.enable` that say which steps are full.

    Raises: LesaError unless exactly one of the two is given with a forecaster, none without.
    """
    if forecaster is None:
        if full_steps is not None or interval is not None:
            raise LesaError(
                "forecaster=None: --full-steps and --interval need one; give --forecaster"
            )
        return {}
    if (full_steps is None) == (interval is None):
        raise LesaError(
            f"full-steps={full_steps}: with interval={interval} it does not say which steps are"
            " full; give either --full-steps or --interval with a forecaster"
        )
    if interval is not None:
        return {"schedule": Schedule.every(interval).bind(num_steps)}
    assert full_steps is not None
    check_count(full_steps, num_steps, "full-steps")
    return {"full_steps": full_steps}


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

    files, seconds, counters = [], 0.0, None
    with accelerate(pipe, forecaster, **cache) if cache else nullcontext():
        for start in range(0, len(prompts), request.batch_size):
            chunk = prompts[start : start + request.batch_size]
            seeds = range(request.seed + start, request.seed + start + len(chunk))
            run = generate(pipe, chunk, seeds, settings)
            seconds += run.seconds
            for row, (prompt, image) in enumerate(zip(chunk, run.images, strict=True)):
                path = request.out / f"{start + row:04d}-{_slug(prompt)}.png"
                files.append(write_atomically(path, picture_png(image)))
        if cache:
            counters = stats(pipe)
    return {
        "files": files,
        "seconds": seconds,
        "settings": dict(settings),
        "stats": counters.to_dict() if counters else None,
        "summary": str(counters) if counters else "plain run",
    }


def picture_png(image: Tensor) -> bytes:
    """[3, H, W] in [0, 1] as PNG; a video [F, 3, H, W] as its frames side by side."""
    from PIL import Image

    if image.ndim == 4:
        image = image.movedim(0, -2).flatten(-2)  # [3, H, F * W]
    pixels = (image.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "prompt"
