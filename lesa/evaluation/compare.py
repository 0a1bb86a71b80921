"""Run every method on the same prompts and seeds, and say how far from the plain run each ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lesa.errors import LesaError
from lesa.evaluation.method import Method
from lesa.evaluation.runs import Run, generate, step_flops
from lesa.evaluation.tally import Tally
from lesa.prompts import pictures_per_prompt, settings_of

PLAIN = "plain"


@dataclass
class Comparison:
    """What `compare` measured.

    rows: one dict per method, with the keys `COLUMNS`, for videos also `VIDEO_COLUMNS`; decibels
        against the plain run's pictures (psnr_mean is the mean of the pictures' dB, psnr_p10
        their 10th percentile; psnr_frame_* are over frames, temporal_psnr is of the differences
        between frames), seconds of the denoising loop for one batch, speedup over the plain loop
        in the same round, tflops of one prompt's loop, cache_bytes held during a batch.
    curves: label -> relative RMS error of the latent after each step, mean over prompts.
    pictures: label (and "plain") -> the first pictures, [n, C, H, W] in [0, 1], or videos,
        [n, F, C, H, W]; `titles` are the prompts of all pictures.
    notes: steps that a cache had to run in full, by reason.
    """

    prompts: list[str]
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    pictures: dict[str, Tensor] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plain_seconds: float = 0.0
    plain_tflops: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures."""
        return {
            "settings": self.settings,
            "prompts": self.prompts,
            "plain": {"seconds": self.plain_seconds, "tflops": self.plain_tflops},
            "rows": self.rows,
            "error_per_step": self.curves,
            "notes": self.notes,
        }


def compare(
    pipe: Any,
    prompts: Sequence[str],
    methods: Sequence[Method],
    settings: Mapping[str, Any],
    *,
    seed: int = 0,
    batch_size: int = 8,
    keep_pictures: int = 8,
    advance: Callable[[str], object] = lambda label: None,
) -> Comparison:
    """Compare methods with the plain pipeline on the same prompts, seeds and settings.

    The plain run is made once per batch, each method right after it, in rotating order, so that a
    slow moment of the machine falls on all alike. Prompt i is drawn with seed + i (its picture n
    of N with seed + i N + n).

    Args:
        settings: arguments of `pipe(...)`; num_inference_steps is needed. Where it holds
            `prompt_embeds`, one row per prompt, the prompts are titles.
        advance: told the label of every run that has ended.

    Raises: LesaError if there is no prompt or method, or batch_size is below 1.
    """
    _check(prompts, methods, settings, batch_size)
    tallies = {method.label: Tally() for method in methods}
    result = Comparison(list(prompts), dict(settings))
    plain_seconds, plain_pictures = [], []
    each = pictures_per_prompt(settings)
    result.titles = [prompt for prompt in prompts for _ in range(each)]
    first = settings_of(settings, [0], len(prompts))
    _measure_flops(pipe, prompts[0], methods, first, tallies, result)  # also warms the caches up
    for batch, start in enumerate(range(0, len(prompts), batch_size)):
        chunk = prompts[start : start + batch_size]
        rows = range(start, start + len(chunk))
        own = settings_of(settings, rows, len(prompts))
        seeds = range(seed + each * rows.start, seed + each * rows.stop)
        kept = max(0, min(keep_pictures - each * start, each * len(chunk)))
        plain = generate(pipe, chunk, seeds, own, record=True)
        plain_seconds.append(plain.seconds)
        plain_pictures.append(plain.images[:kept])
        advance(PLAIN)
        for method in _rotated(methods, batch):
            tally = tallies[method.label]
            run = _run(pipe, method, chunk, seeds, own, tally)
            tally.add(plain, run)
            tally.pictures.append(run.images[:kept])
            advance(method.label)
    result.plain_seconds = median(plain_seconds)
    result.pictures[PLAIN] = torch.cat(plain_pictures)
    _collect(result, methods, tallies)
    return result


def _collect(result: Comparison, methods: Sequence[Method], tallies: dict[str, Tally]) -> None:
    for method in methods:
        tally = tallies[method.label]
        result.rows.append(tally.row(method))
        result.pictures[method.label] = torch.cat(tally.pictures)
        if tally.errors:
            result.curves[method.label] = torch.cat(tally.errors).mean(0).tolist()
        for reason, count in tally.fallbacks.items():
            result.notes.append(f"{method.label}: {count} more steps ran in full ({reason})")


@contextmanager
def _enabled(pipe: Any, method: Method, tally: Tally | None = None) -> Iterator[None]:
    """The method's cache on the pipeline for a while; its counters go into `tally`."""
    from lesa.api import accelerate, stats

    if method.applied is not None:
        with method.applied(pipe) as use:
            yield
            if tally is not None:
                tally.cache_bytes = max(tally.cache_bytes, use.cache_bytes())
                if use.full_steps is not None:
                    tally.full_steps.append(use.full_steps())
        return
    cache: AbstractContextManager[Any] = (
        accelerate(pipe, method.forecaster, schedule=method.schedule)
        if method.schedule is not None
        else nullcontext()
    )
    with cache:
        yield
        if tally is not None and method.schedule is not None:
            counters = stats(pipe)
            tally.cache_bytes = max(tally.cache_bytes, counters.ring_bytes)
            for reason, count in counters.fallbacks.items():
                tally.fallbacks[reason] = tally.fallbacks.get(reason, 0) + count


def _run(
    pipe: Any,
    method: Method,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    tally: Tally,
) -> Run:
    """One batch of a method; of an adaptive one prompt by prompt."""
    settings = {**settings, **method.overrides, "num_inference_steps": method.num_steps}
    if not method.one_by_one:
        with _enabled(pipe, method, tally):
            return generate(pipe, prompts, seeds, settings, record=True)
    runs, each = [], len(seeds) // len(prompts)
    for row, prompt in enumerate(prompts):
        own = settings_of(settings, [row], len(prompts))
        with _enabled(pipe, method, tally):
            drawn = seeds[each * row : each * (row + 1)]
            runs.append(generate(pipe, [prompt], drawn, own, record=True))
    latents = [torch.cat(step) for step in zip(*(run.latents for run in runs), strict=True)]
    images = torch.cat([run.images for run in runs])
    return Run(images, sum(run.seconds for run in runs), latents)


def _measure_flops(
    pipe: Any,
    prompt: str,
    methods: Sequence[Method],
    settings: Mapping[str, Any],
    tallies: dict[str, Tally],
    result: Comparison,
) -> None:
    """Operations of a whole run for one prompt; of a schedule with a forecaster extrapolated from
    one full and one skipped step."""
    full = step_flops(pipe, prompt, settings, 1)[0]
    result.plain_tflops = full * settings["num_inference_steps"] / 1e12
    for method in methods:
        tally = tallies[method.label]
        if method.applied is not None:
            own = {**settings, **method.overrides, "num_inference_steps": method.num_steps}
            with _enabled(pipe, method):
                tally.tflops = sum(step_flops(pipe, prompt, own, method.num_steps)) / 1e12
            continue
        skipped = method.schedule.skipped_steps if method.schedule else ()
        cost = 0
        if skipped:
            with _enabled(pipe, method):
                cost = step_flops(pipe, prompt, settings, skipped[0] + 1)[skipped[0]]
        tally.tflops = (full * method.full_steps + cost * len(skipped)) / 1e12


def _rotated(methods: Sequence[Method], by: int) -> list[Method]:
    by %= len(methods)
    return [*methods[by:], *methods[:by]]


def _check(
    prompts: Sequence[str], methods: Sequence[Method], settings: Mapping[str, Any], batch_size: int
) -> None:
    if not prompts:
        raise LesaError("prompts: the list is empty; give at least one prompt")
    if not methods:
        raise LesaError("methods: the list is empty; give at least one")
    if batch_size < 1:
        raise LesaError(f"batch_size: {batch_size} is below 1; give at least 1")
    if "num_inference_steps" not in settings:
        raise LesaError("settings: num_inference_steps is missing; give the number of steps")
    labels = [method.label for method in methods]
    if len(set(labels)) < len(labels):
        raise LesaError(f"methods: {labels} holds one twice; give each method once")
