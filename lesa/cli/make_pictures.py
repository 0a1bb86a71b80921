"""Prompts to files, a batch at a time, by one process or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lesa.cli.launch import require_shared
from lesa.cli.manifest import MANIFEST, Asked, Manifest
from lesa.cli.pictures import file_name, save
from lesa.cli.requests import GenerateRequest
from lesa.util.progress import Progress
from lesa.util.ranks import Ranks

__all__ = ["make_pictures"]


def make_pictures(
    pipe: Any,
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    request: GenerateRequest,
    forecaster: Any,
    cache: Mapping[str, Any],
    ranks: Ranks,
    manifest: Manifest,
) -> dict[str, Any]:
    """Generate in batches and save each batch at once, so that an interrupt loses one at most.

    Args:
        forecaster: What skips steps, None for a plain run.
        cache: Arguments of `lesa.enable` beside it; empty for a plain run.
        ranks: Who else is at work; each takes whole batches, so that pixels do not depend on them.
        manifest: What has been made already, and where what is made is noted.
    """
    from lesa.api import accelerate, stats

    require_shared(request.out, ranks)
    names = [file_name(number, prompt) for number, prompt in enumerate(prompts)]
    seeds = range(request.seed, request.seed + len(prompts))
    asked, size = [*zip(names, prompts, seeds, strict=True)], request.batch_size
    batches = [asked[start : start + size] for start in range(0, len(asked), size)]
    batches = ranks.told([batch for batch in batches if not all(manifest.finished(batch))])
    own, counters, runs = ranks.share(batches), None, []
    work = len(own) * settings["num_inference_steps"]
    with (
        Progress(quiet=not ranks.leads).bar("generate", work) as bar,
        accelerate(pipe, forecaster, **cache) if cache else nullcontext(),
        manifest.merged(ranks),
    ):
        for batch in own:
            runs.append(_make(pipe, batch, settings, request, manifest, bar.advance))
        if cache and own:
            counters = stats(pipe)
    return {
        "files": _files(request.out, names),
        "manifest": request.out / MANIFEST,
        "made": sum(map(len, batches)),
        "seconds": sum(ranks.everyone(sum(seconds for seconds, _ in runs))),
        "settings": dict(settings),
        "scheduler": type(pipe.scheduler).__name__,
        "video": any(moving for _, moving in runs),
        "stats": counters.to_dict() if counters else None,
        "summary": str(counters or ("nothing was made" if cache else "plain run")),
    }


def _make(
    pipe: Any,
    batch: Sequence[Asked],
    settings: Mapping[str, Any],
    request: GenerateRequest,
    manifest: Manifest,
    on_step: Callable[[], object],
) -> tuple[float, bool]:
    """Generate, save and note one batch; the seconds of its denoising, and whether it is moving."""
    from lesa.api import stats
    from lesa.hooks.timed_run import generate

    names, prompts, seeds = zip(*batch, strict=True)
    run = generate(pipe, prompts, seeds, settings, on_step=on_step)
    images = zip(run.images, names, strict=True)
    files = [save(image, request.out, name, request.fps)[-1].name for image, name in images]
    full = len(stats(pipe).full_steps) if request.forecaster else settings["num_inference_steps"]
    manifest.add(batch, files, run.seconds / len(batch), full)
    return run.seconds, run.images.ndim == 5


def _files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of these names that are there: a picture or strip, and a video's mp4."""
    files = [folder / f"{name}.{ending}" for name in names for ending in ("png", "mp4")]
    return [file for file in files if file.exists()]
