"""How far a step list could go: the same kind of forecast, fitted on every measured prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from lesa.evaluation.compare import Comparison
from lesa.evaluation.method import Method
from lesa.evaluation.metrics import psnr
from lesa.evaluation.metrics_row import MetricsRow
from lesa.evaluation.runner import Chunk, run_method
from lesa.forecasters.lesa import LesaForecaster
from lesa.hooks.prompt_inputs import pictures_per_prompt
from lesa.training.calibrate import Calibrator
from lesa.training.collect import collect
from lesa.training.job import Job, call_arguments
from lesa.util.progress import Progress

UNLIMITED = 1e9  # full steps of a prompt: all settings compete


def add_limits(
    pipe: Any,
    result: Comparison,
    methods: Sequence[Method],
    progress: Progress | None = None,
) -> None:
    """Give each of lesa's rows `limit`: the mean PSNR, in dB, of its least-squares bound.

    The bound has a table for every prompt of its own, fitted in closed loop on the states of that
    prompt and seed alone (`lesa.training.calibrate.Calibrator.fit`), on the row's list of full
    steps and with as many regressors. No forecaster that serves all prompts can be fitted closer
    step by step; one whose gaps are fitted together may still pass it on single prompts.

    Args:
        result: what `compare` measured with these methods; its rows are completed.
        progress: where a bar is shown; none by default.
    """
    rows = {row["label"]: row for row in result.rows}
    own = [method for method in methods if method.name == "lesa" and method.label in rows]
    progress = progress or Progress(quiet=True)
    with progress.bar("limit", len(own) * len(result.prompts)) as bar:
        for method in own:
            limits = []
            for row in range(len(result.prompts)):
                limits += _limit(pipe, result, method, row)
                bar.advance(1, method.label)
            rows[method.label] |= {"limit": fmean(limits), "limit_psnr": limits}


def _limit(pipe: Any, result: Comparison, method: Method, row: int) -> list[float]:
    """dB of one prompt's pictures with a table that was fitted on them."""
    each = pictures_per_prompt(result.settings)
    chunk = Chunk.of(result.prompts, result.settings, [row], result.seed, each)
    plain = run_method(pipe, Method("plain", method.num_steps), chunk, MetricsRow())
    fitted = _fitted(pipe, method, chunk.prompts, chunk.settings, chunk.seeds[0])
    run = run_method(pipe, fitted, chunk, MetricsRow())
    return psnr(plain.images, run.images).tolist()


def _fitted(
    pipe: Any, method: Method, prompts: Sequence[str], settings: Mapping[str, Any], seed: int
) -> Method:
    """The method with a table of this prompt's own."""
    made, call = method.forecaster.settings, call_arguments(pipe, dict(settings))[0]
    call.pop("num_inference_steps", None)
    job = Job(pipe, prompts, call, made.tap, seed)
    statistics = collect(job, method.num_steps)
    table = LesaForecaster(
        "table",
        tap=made.tap,
        history=made.history,
        uses_latent=made.uses_latent,
        branches=statistics.branches,
        num_steps=method.num_steps,
    )
    assert method.schedule is not None  # a forecaster always has one
    calibrator = Calibrator(job, table, statistics)
    calibrator.store(calibrator.fit([method.schedule.full_steps], UNLIMITED))
    return Method("limit", method.num_steps, table, method.schedule, "searched")
