"""``lesa.train``: collect, ground-truth fit, schedule search and closed-loop fit in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.forecasters import LesaForecaster
from lesa.forecasters.guard import Mode
from lesa.forecasters.paper import PaperForm
from lesa.training import arguments, numbers
from lesa.training.aims import Aim, calibrate, collect_all
from lesa.training.calibration_prompts import checked_prompts, held_out
from lesa.training.disca import check_disca, train_disca
from lesa.training.fit import fit_continuous, fit_paper
from lesa.training.job import Job
from lesa.training.on_policy import visited_gram
from lesa.training.search import search_schedule
from lesa.training.statistics import Statistics
from lesa.training.work import Work
from lesa.util.files import require_writable
from lesa.util.numerics import gradients
from lesa.util.progress import Progress
from lesa.util.ranks import Ranks


@gradients()
def train(
    pipe: Any,
    prompts: Iterable[str] | None,
    num_inference_steps: int | Sequence[int] = 50,
    full_steps: int | Sequence[int] = 10,
    *,
    form: str = "continuous",
    tap: str = "output",
    schedule: Schedule | None = None,
    refine: int = 1,
    polish: int = 1,
    validation: Iterable[str] | int | None = None,
    budget: float | str | None = None,
    target_psnr: float | None = None,
    guard: Mode | None = None,
    batch_size: int = 8,
    seed: int = 0,
    call: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    progress: bool | Progress = True,
    group: Any = None,
    **more: Any,
) -> LesaForecaster:
    """Train a forecaster for a diffusers pipeline on a few prompts.

    Args:
        pipe: the pipeline, as it will be used: its scheduler is the one trained for.
        prompts: calibration prompts; 8 to 32 are enough. None where ``call`` holds
            ``prompt_embeds`` and what belongs to them, one row per prompt, for a pipeline
            without text encoders.
        num_inference_steps: step count, or several (one checkpoint serves all).
        full_steps: number of full steps to calibrate, or several.
        form: "continuous" or "table"; "paper" or "disca" (a network on skipped steps, for few-step
            models): one step count, one number of full steps.
        tap: "output" (the returned velocity) or "hidden" (before the last norm).
        schedule: calibrate this step list (bound or a rule) instead of searching one per count;
            ``full_steps`` is not used then.
        refine: 1 lets step lists race each other as accelerated runs; 0 takes the one that is best
            on the statistics of the plain runs.
        polish: rounds of fitting all gaps together on the final latents, after all else.
        validation: prompts that nothing is fitted to, on which lists are chosen and judged, or how
            many of ``prompts`` are held out for that; every fourth of 8 or more by default, beside
            which what the budget has left judges some that were fitted, up to 16 together.
        budget: what all may cost: a number of plain generations, or a time ("20min"). By default
            4 for each prompt (10 for four numbers of full steps), and from 10 prompts on 40 (100)
            in all, until that is 2.5 (7) for each.
        target_psnr: find the smallest number of full steps whose 10th percentile of PSNR on those
            prompts holds so many dB; ``full_steps`` is where the search begins.
        guard: "route" or "spend" looks for a rule by which pictures at risk get another list, or
            further full steps; it is kept if it pays (`lesa.forecasters.guard.Guard`). It takes two
            more accelerated runs of every prompt; 64 prompts or more tell better than 16.
        batch_size: prompts that the denoiser computes at once.
        seed: prompt i is generated from noise seed + i (picture n of N: seed + i N + n).
        call: further arguments of ``pipe(...)`` (height, guidance_scale, ...).
        settings: fields of the forecaster (``history``, ``stages``, ``gate``, ...; see
            `lesa.forecasters.settings.Settings`).
        folder: keep statistics here, to resume an interrupted collection.
        progress: show bars and log lines; or a Progress, which keeps the lines.
        group: a process group of torch.distributed whose ranks share the work, each with a whole
            pipeline of its own (of the same weights); all get the same forecaster. None: this
            process does all of it, also as one of several that run one pipeline together.
        more: the same as in ``call`` or ``settings``, each told by its name.

    Returns:
        A LesaForecaster; ``save_pretrained`` writes it.

    Raises:
        LesaError: no prompts, impossible counts or an unknown argument, before the pipeline runs;
            or a pipeline whose steps cannot be followed.
    """
    arguments.check_pipe(pipe, prompts)
    counts = numbers.whole_numbers("num_inference_steps", num_inference_steps)
    wanted = numbers.whole_numbers("full_steps", full_steps)
    if schedule is not None:
        wanted = numbers.counts_of(schedule, counts)
    numbers.check_counts(counts, wanted, form, listed=schedule is not None)
    if form == "disca":
        check_disca(pipe, counts, wanted)
    numbers.check_at_least(0, refine=refine, polish=polish)
    target = numbers.checked_target(target_psnr, form, schedule, wanted)
    guard = "off" if guard is None else guard
    allowed = numbers.checked_budget(budget, form, guard != "off")
    seed = numbers.check_seed(seed)
    numbers.check_at_least(1, batch_size=batch_size)
    taken, fields = arguments.sorted_arguments(pipe, call, settings, more, counts)
    arguments.checked_settings(form, tap, fields)
    texts = checked_prompts(prompts, taken)
    where = None if folder is None else require_writable(folder, "folder")
    ranks = Ranks.of(group)
    quiet = not progress or not ranks.leads
    report = progress if isinstance(progress, Progress) else Progress(quiet=quiet)
    everyone, held = held_out(validation, texts, taken)
    numbers.check_guard(guard, form, len(everyone))
    numbers.check_ranks(ranks, len(everyone), batch_size, form)
    fill = validation is None
    aim = Aim(counts, wanted, schedule, bool(refine), polish, allowed, target, guard, fill)
    aim.budget.check(len(everyone), len(held or everyone), wanted, counts[0])
    job = Job(pipe, everyone, taken, tap, seed, batch_size, where, report, Work(), held, ranks)
    _check_tap(job)
    collected = collect_all(job, aim, estimate=form in numbers.BUDGETED)
    forecaster = _untrained(job, collected[0], form, fields)
    _keep_moments(forecaster, max(collected, key=lambda statistics: statistics.num_steps))
    _fit(job, forecaster, collected, aim)
    _tell_cost(job)
    return forecaster


def _fit(job: Job, forecaster: LesaForecaster, collected: Sequence[Statistics], aim: Aim) -> None:
    """What each form is fitted by."""
    if forecaster.form == "paper":
        _train_paper(job, forecaster, collected[0], aim.schedule, aim.full_steps[0])
        return
    if forecaster.form == "disca":
        train_disca(job, forecaster, collected[0], aim.schedule, aim.full_steps[0])
        return
    stopped = False
    if forecaster.form == "continuous":
        try:
            fit_continuous(forecaster, collected, seed=job.seed, progress=job.progress)
        except KeyboardInterrupt:  # the plain runs are worth something without it
            stopped = True
    calibrate(job, forecaster, collected, aim, stopped)


def _keep_moments(forecaster: LesaForecaster, statistics: Statistics) -> None:
    """Let it know how alike the outputs of plain runs are: it damps by that what was not fitted."""
    if forecaster.form != "paper":
        grams = {branch: statistics.mean(branch) for branch in statistics.branches}
        forecaster.moments.keep(statistics.sigmas, grams, statistics.has_latent)


def _tell_cost(job: Job) -> None:
    """What the denoiser was run for, in plain generations: that is what training costs."""
    each = job.spent / len(job.prompts)
    job.progress.line(f"cost: {each:.1f} plain generations per prompt, {job.spent:.0f} in all")


def _check_tap(job: Job) -> None:
    if job.tap == "hidden" and len(job.models) > 1:
        raise LesaError(
            f"tap='hidden': {type(job.pipe).__name__} has {len(job.models)} transformers, each "
            "with a separate tail; train with tap='output'"
        )


def _untrained(
    job: Job, statistics: Statistics, form: str, fields: dict[str, Any]
) -> LesaForecaster:
    known = {
        "branches": statistics.branches,
        "num_steps": statistics.num_steps,
        "uses_latent": statistics.has_latent and form != "paper",
    }
    return LesaForecaster(form, tap=job.tap, metadata=job.metadata(), **{**known, **fields})


def _train_paper(
    job: Job,
    forecaster: LesaForecaster,
    statistics: Statistics,
    schedule: Schedule | None,
    full_steps: int,
) -> None:
    """The paper's own form: tied to one step list, in the paper's two phases."""
    plan = search_schedule(statistics, full_steps) if schedule is None else schedule
    plan = plan.bind(statistics.num_steps)

    def visits(net: PaperForm) -> dict[str, Tensor]:
        return visited_gram(job, net, plan, statistics.sigmas, statistics.branches)

    fit_paper(forecaster, statistics, plan, visits, progress=job.progress)
    forecaster.recommend(plan, statistics.sigmas)
