"""``lesa.train``: collect, ground-truth fit, schedule search and closed-loop fit in one call."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.forecasters import LesaForecaster
from lesa.forecasters.paper import PaperForm
from lesa.hooks.prompt_inputs import count_prompts
from lesa.training.calibrate import Calibrator
from lesa.training.collect import collect
from lesa.training.fit import fit_continuous, fit_paper
from lesa.training.job import Job, call_arguments
from lesa.training.on_policy import visited_gram
from lesa.training.progress import Progress
from lesa.training.search import search_schedule
from lesa.training.statistics import Statistics
from lesa.util.numerics import gradients


@gradients()
def train(
    pipe: Any,
    prompts: Sequence[str] | None,
    num_inference_steps: int | Sequence[int] = 50,
    full_steps: int | Sequence[int] = 10,
    *,
    form: str = "continuous",
    tap: str = "output",
    schedule: Schedule | None = None,
    refine: int = 3,
    polish: int = 2,
    batch_size: int = 8,
    seed: int = 0,
    call: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    progress: bool | Progress = True,
    **more: Any,
) -> LesaForecaster:
    """Train a forecaster for a diffusers pipeline on a few prompts.

    Args:
        pipe: the pipeline, as it will be used: its scheduler is the one trained for.
        prompts: calibration prompts; 5 to 32 are enough. None where ``call`` holds
            ``prompt_embeds`` and what belongs to them, one row per prompt, for a pipeline
            without text encoders.
        num_inference_steps: step count, or several (one checkpoint serves all).
        full_steps: number of full steps to calibrate, or several.
        form: "continuous", "table" or "paper" (one step count, one number of full steps).
        tap: "output" (the returned velocity) or "hidden" (before the last norm).
        schedule: calibrate this step list (bound or a rule) instead of searching one per count.
        refine: rounds of search by true accelerated runs after the search on statistics.
        polish: rounds of fitting all gaps together on the final latents, after all else.
        batch_size: prompts that the denoiser computes at once.
        seed: prompt i is generated from noise seed + i (picture n of N: seed + i N + n).
        call: further arguments of ``pipe(...)``.
        folder: keep statistics here, to resume an interrupted collection.
        progress: show bars and log lines; or a Progress, which keeps the lines.
        more: arguments of ``pipe(...)`` (height, guidance_scale, ...) or fields of the forecaster
            (``history``, ``stages``, ``gate``, ...; see ``lesa.forecasters.settings.Settings``).

    Returns:
        A LesaForecaster; ``save_pretrained`` writes it.

    Raises:
        LesaError: no prompts, impossible counts, an unknown argument, or a pipeline whose steps
            cannot be followed.
    """
    counts = _whole_numbers("num_inference_steps", num_inference_steps)
    wanted = _whole_numbers("full_steps", full_steps)
    if max(wanted) > min(counts):
        raise LesaError(
            f"full_steps={max(wanted)} is more than num_inference_steps={min(counts)}: ask for "
            "fewer full steps"
        )
    taken, fields = call_arguments(pipe, {**(call or {}), **more})
    taken.pop("num_inference_steps", None)
    report = progress if isinstance(progress, Progress) else Progress(quiet=not progress)
    calibration = _checked_prompts(prompts, taken)
    job = Job(pipe, calibration, taken, tap, seed, batch_size, _folder(folder), report)
    if tap == "hidden" and len(job.models) > 1:
        raise LesaError(
            f"tap='hidden': {type(pipe).__name__} has {len(job.models)} transformers, each with a "
            "tail of its own; train with tap='output'"
        )
    started = time.perf_counter()
    collected = [collect(job, count) for count in counts]
    job.progress.line(f"collect: {time.perf_counter() - started:.1f} s")
    forecaster = _untrained(job, collected[0], form, fields)
    if form == "paper":
        return _train_paper(job, forecaster, collected[0], schedule, wanted)
    if form == "continuous":
        fit_continuous(forecaster, collected, seed=seed, progress=job.progress)
    for statistics in collected:
        calibrator = Calibrator(job, forecaster, statistics)
        if schedule is not None:
            rollouts = calibrator.fit([schedule.bind(statistics.num_steps)])
        else:
            rollouts = calibrator.refine(calibrator.fit(calibrator.search(wanted)), refine)
        calibrator.store(calibrator.joint_fit(rollouts, polish))
    return forecaster


def _untrained(
    job: Job, statistics: Statistics, form: str, fields: dict[str, Any]
) -> LesaForecaster:
    known = {
        "branches": statistics.branches,
        "num_steps": statistics.num_steps,
        "uses_latent": statistics.has_latent and form != "paper",
    }
    try:
        return LesaForecaster(form, tap=job.tap, metadata=job.metadata(), **{**known, **fields})
    except TypeError as error:
        raise LesaError(
            f"{', '.join(fields)}: not all are arguments of {type(job.pipe).__name__} or fields of "
            f"the forecaster ({error}); drop or correct them"
        ) from None


def _train_paper(
    job: Job,
    forecaster: LesaForecaster,
    statistics: Statistics,
    schedule: Schedule | None,
    wanted: list[int],
) -> LesaForecaster:
    """The paper's own form: tied to one step list, in the paper's two phases."""
    plan = search_schedule(statistics, wanted[0]) if schedule is None else schedule
    plan = plan.bind(statistics.num_steps)

    def visits(net: PaperForm) -> dict[str, Tensor]:
        return visited_gram(job, net, plan, statistics.sigmas, statistics.branches)

    fit_paper(forecaster, statistics, plan, visits, progress=job.progress)
    forecaster.recommend(plan, statistics.sigmas)
    return forecaster


def _checked_prompts(prompts: Sequence[str] | None, call: Mapping[str, Any]) -> list[str]:
    if prompts is None:
        return [f"embedding {row}" for row in range(count_prompts(call))]
    fine = not isinstance(prompts, str) and len(prompts) > 0
    if not fine or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise LesaError(
            f"prompts={prompts!r} must be a list of non-empty strings: pass 5 to 32 prompts"
        )
    return list(prompts)


def _whole_numbers(name: str, value: int | Sequence[int]) -> list[int]:
    numbers = [value] if isinstance(value, int) else list(value)
    if not numbers or not all(isinstance(n, int) and n >= 1 for n in numbers):
        raise LesaError(f"{name}={value!r} must be a whole number of at least 1, or several")
    return list(dict.fromkeys(numbers))


def _folder(folder: str | Path | None) -> Path | None:
    if folder is None:
        return None
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LesaError(
            f"folder={str(folder)!r} cannot be made ({error}): choose another"
        ) from None
    return path
