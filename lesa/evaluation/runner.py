"""One batch of one method: its cache put on, run, measured and taken off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lesa.evaluation.method import Method
from lesa.evaluation.metrics_row import MetricsRow
from lesa.evaluation.runs import Run, generate, step_flops
from lesa.hooks.prompt_inputs import settings_of


@dataclass(frozen=True)
class Chunk:
    """Some of the prompts, with their own settings and one seed and title per picture."""

    prompts: list[str]
    settings: dict[str, Any]
    seeds: list[int]
    titles: list[str]

    @classmethod
    def of(
        cls,
        prompts: Sequence[str],
        settings: Mapping[str, Any],
        rows: Sequence[int],
        seed: int,
        each: int,
    ) -> Chunk:
        chosen = [prompts[row] for row in rows]
        seeds = [seed + each * row + n for row in rows for n in range(each)]
        titles = [prompt for prompt in chosen for _ in range(each)]
        return cls(chosen, settings_of(settings, rows, len(prompts)), seeds, titles)


@contextmanager
def _enabled(pipe: Any, method: Method, measured: MetricsRow | None = None) -> Iterator[None]:
    """The method's cache on the pipeline for a while; its counters go into `measured`."""
    from lesa.api import accelerate, stats

    if method.applied is not None:
        with method.applied(pipe) as use:
            yield
            if measured is not None:
                measured.cache_bytes = max(measured.cache_bytes, use.cache_bytes())
                if use.full_steps is not None:
                    measured.full_steps.append(use.full_steps())
        return
    cache: AbstractContextManager[Any] = (
        accelerate(pipe, method.forecaster, schedule=method.schedule)
        if method.schedule is not None
        else nullcontext()
    )
    with cache:
        yield
        if measured is not None and method.schedule is not None:
            counters = stats(pipe)
            measured.cache_bytes = max(measured.cache_bytes, counters.ring_bytes)
            for reason, count in counters.fallbacks.items():
                measured.fallbacks[reason] = measured.fallbacks.get(reason, 0) + count
            if counters.risk is not None:
                measured.full_steps.append(len(counters.full_steps))


def run_method(
    pipe: Any,
    method: Method,
    chunk: Chunk,
    measured: MetricsRow,
    on_step: Callable[[], object] = lambda: None,
) -> Run:
    """One batch of a method; of an adaptive one prompt by prompt. `on_step` is called after every
    step."""
    settings = {**chunk.settings, **method.overrides, "num_inference_steps": method.num_steps}
    if not method.one_by_one:
        with _peak_memory(pipe, measured), _enabled(pipe, method, measured):
            return generate(
                pipe, chunk.prompts, chunk.seeds, settings, record=True, on_step=on_step
            )
    runs, each = [], len(chunk.seeds) // len(chunk.prompts)
    for row, prompt in enumerate(chunk.prompts):
        own = settings_of(settings, [row], len(chunk.prompts))
        drawn = chunk.seeds[each * row : each * (row + 1)]
        with _peak_memory(pipe, measured), _enabled(pipe, method, measured):
            runs.append(generate(pipe, [prompt], drawn, own, record=True, on_step=on_step))
    latents = [torch.cat(step) for step in zip(*(run.latents for run in runs), strict=True)]
    images = torch.cat([run.images for run in runs])
    seconds = sum(run.seconds for run in runs)
    cpu_seconds = sum(run.cpu_seconds for run in runs)
    return Run(images, seconds, latents, cpu_seconds)


@contextmanager
def _peak_memory(pipe: Any, measured: MetricsRow) -> Iterator[None]:
    """The most that CUDA allocated meanwhile beyond what was there before goes into `measured`."""
    device = torch.device(getattr(pipe, "_execution_device", "cpu"))
    if device.type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield
    peak = torch.cuda.max_memory_allocated(device) - before
    measured.peak_bytes = max(measured.peak_bytes or 0, peak)


def run_tflops(
    pipe: Any, prompt: str, method: Method, settings: Mapping[str, Any], full: int
) -> float:
    """TFLOP of a whole run for one prompt; of a schedule with a forecaster extrapolated from one
    full step, whose operations are given, and one skipped step."""
    if method.applied is not None:
        own = {**settings, **method.overrides, "num_inference_steps": method.num_steps}
        with _enabled(pipe, method):
            return sum(step_flops(pipe, prompt, own, method.num_steps)) / 1e12
    skipped = method.schedule.skipped_steps if method.schedule else ()
    cost = 0
    if skipped:
        with _enabled(pipe, method):
            cost = step_flops(pipe, prompt, settings, skipped[0] + 1)[skipped[0]]
    return (full * method.full_steps + cost * len(skipped)) / 1e12
