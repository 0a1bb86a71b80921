"""``lesa.train``: collect, ground-truth fit, schedule search and closed-loop fit in one call."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lesa.api import find_denoiser
from lesa.errors import LesaError
from lesa.forecasters import LesaForecaster
from lesa.schedule import Schedule
from lesa.training.closed_loop import Lane, run_lanes
from lesa.training.collect import collect, fingerprint
from lesa.training.fit import fit_continuous, fit_paper
from lesa.training.progress import Progress
from lesa.training.search import OpenLoop, balanced, neighbours, search_schedule
from lesa.training.statistics import Statistics

DRIFTS = (
    0.3,
    0.6,
    1.0,
)  # values of beta that the closed-loop fit tries; which is best depends on the step list


def train(
    pipe: Any,
    prompts: Sequence[str],
    num_inference_steps: int | Sequence[int] = 50,
    full_steps: int | Sequence[int] = 10,
    *,
    form: str = "continuous",
    tap: str = "output",
    history: int = 3,
    stages: tuple[float, ...] = (0.9, 0.5),
    schedule: Schedule | None = None,
    refine: int = 2,
    batch_size: int = 8,
    seed: int = 0,
    call: dict[str, Any] | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
    **fields: Any,
) -> LesaForecaster:
    """Train a forecaster for a diffusers pipeline on a few prompts.

    Args:
        pipe: the pipeline; its own scheduler and the guidance in ``call`` are trained for.
        prompts: calibration prompts; 5 to 32 are enough.
        num_inference_steps: step count, or several (one checkpoint serves all).
        full_steps: number of full steps to calibrate, or several.
        form: "continuous", "table" or "paper" (one step count, one number of full steps).
        tap: "output" (the returned velocity) or "hidden" (before the last norm).
        history: K, cached features.
        stages: noise levels that part the experts.
        schedule: calibrate this step list (bound or a rule) instead of searching one per count.
        refine: rounds of search by true accelerated runs after the search on statistics.
        batch_size: prompts whose features are in memory at once.
        seed: prompt i is generated from noise seed + i.
        call: further arguments of ``pipe(...)``, for example height, width, guidance_scale.
        folder: keep statistics here, to resume an interrupted collection.
        fields: further fields of ``lesa.forecasters.Settings``.

    Returns:
        A LesaForecaster; ``save_pretrained`` writes it.

    Raises:
        LesaError: no prompts, impossible counts, or a pipeline that cannot be followed.
    """
    prompts = _checked_prompts(prompts)
    counts = _whole_numbers("num_inference_steps", num_inference_steps)
    wanted = _whole_numbers("full_steps", full_steps)
    if max(wanted) > min(counts):
        raise LesaError(
            f"full_steps={max(wanted)} is more than num_inference_steps={min(counts)}: ask for "
            "fewer full steps"
        )
    call = {k: v for k, v in (call or {}).items() if k != "num_inference_steps"}
    report = Progress(quiet=not progress)
    where = None if folder is None else Path(folder)
    if where is not None:
        where.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = dict(
        tap=tap, batch_size=batch_size, seed=seed, call=call, folder=where, progress=report
    )
    started = time.perf_counter()
    collected = {count: collect(pipe, prompts, count, **options) for count in counts}
    report.line(f"collect: {time.perf_counter() - started:.1f} s")
    first = collected[counts[0]]
    forecaster = LesaForecaster(
        form,
        tap=tap,
        history=history,
        stages=stages,
        branches=tuple(first.grams),
        num_steps=counts[0],
        uses_latent=first.has_latent and form != "paper",
        metadata=_metadata(pipe, prompts, seed, call),
        **fields,
    )
    if form == "paper":
        plan = schedule or search_schedule(first, wanted[0], history=history)
        plan = plan.bind(counts[0])
        fit_paper(forecaster, first, plan, progress=report)
        forecaster.recommend(plan, first.sigmas)
        return forecaster
    started = time.perf_counter()
    if form == "continuous":
        fit_continuous(forecaster, list(collected.values()), seed=seed, progress=report)
    report.line(f"ground-truth fit: {time.perf_counter() - started:.1f} s")
    for statistics in collected.values():
        calibrate(
            pipe,
            prompts,
            forecaster,
            statistics,
            wanted,
            schedule=schedule,
            refine=refine,
            chunk=batch_size,
            seed=seed,
            call=call,
            progress=report,
        )
    return forecaster


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    forecaster: LesaForecaster,
    statistics: Statistics,
    full_steps: Sequence[int],
    *,
    schedule: Schedule | None = None,
    refine: int = 2,
    chunk: int = 8,
    seed: int = 0,
    call: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Search full steps and fit the closed loop for each count; the best lane's rows go into the
    forecaster."""
    progress = progress or Progress(quiet=True)
    history, num_steps = forecaster.settings.history, statistics.num_steps
    started = time.perf_counter()
    if schedule is not None:
        plans = [schedule.bind(num_steps)]
    else:
        plans = [search_schedule(statistics, count, history=history) for count in full_steps]
        progress.line(
            f"schedule search: {time.perf_counter() - started:.1f} s on statistics of {num_steps} steps"
        )

    def prior(plan: Schedule, sigmas: tuple[float, ...], branch: str) -> torch.Tensor:
        with torch.no_grad():
            return forecaster.net.rows(plan, sigmas, branch)[0]

    def run(lanes: list[Lane]) -> None:
        run_lanes(
            pipe,
            prompts,
            lanes,
            prior,
            num_inference_steps=num_steps,
            tap=forecaster.tap,
            seed=seed,
            chunk=chunk,
            call=call,
        )

    started = time.perf_counter()
    lanes = [
        Lane(plan, history, forecaster.uses_latent, drift) for plan in plans for drift in DRIFTS
    ]
    run(lanes)
    best = {
        len(plan.full_steps): max((lane for lane in lanes if lane.schedule == plan), key=_quality)
        for plan in plans
    }
    progress.line(
        f"closed-loop fit: {time.perf_counter() - started:.1f} s for {len(plans)} step lists of {num_steps} steps"
    )
    judge, tried = OpenLoop(statistics, history), {lane.schedule.full_steps for lane in lanes}
    started = time.perf_counter()
    for _ in range(refine if schedule is None else 0):
        lanes = []
        for leader in best.values():
            near = (
                plan
                for plan in neighbours(leader.schedule.full_steps, num_steps, 2)
                if plan not in tried
            )
            chosen = sorted(near, key=judge.quality, reverse=True)[:4]
            tried.update(chosen)
            lanes += [
                replace(leader, schedule=Schedule.explicit(plan, num_steps), coefficients={})
                for plan in chosen
            ]
        run(lanes)
        for lane in lanes:
            count = len(lane.schedule.full_steps)
            best[count] = max(best[count], lane, key=_quality)
    if refine and schedule is None:
        progress.line(
            f"search by accelerated runs: {time.perf_counter() - started:.1f} s for {refine} rounds"
        )
    for lane in best.values():
        assert lane.score is not None
        for branch, rows in lane.coefficients.items():
            forecaster.correct(lane.schedule, statistics.sigmas, branch, rows)
        loss = sum(map(sum, lane.residual.values())) / max(1, sum(map(len, lane.residual.values())))
        progress.line(
            f"closed-loop fit: {len(lane.schedule.full_steps)} of {num_steps} full {lane.schedule.full_steps}, "
            f"loss {loss:.5f}, latent {lane.score.mean():.1f} dB mean, {torch.quantile(lane.score, 0.1):.1f} dB worst decile "
            f"(beta {lane.drift})"
        )


def _quality(lane: Lane) -> float:
    assert lane.score is not None
    return balanced(lane.score)


def _checked_prompts(prompts: Sequence[str]) -> list[str]:
    if (
        isinstance(prompts, str)
        or not prompts
        or not all(isinstance(p, str) and p.strip() for p in prompts)
    ):
        raise LesaError(
            f"prompts={prompts!r} must be a list of non-empty strings: pass 5 to 32 prompts"
        )
    return list(prompts)


def _whole_numbers(name: str, value: int | Sequence[int]) -> list[int]:
    numbers = [value] if isinstance(value, int) else list(value)
    if not numbers or not all(isinstance(n, int) and n >= 1 for n in numbers):
        raise LesaError(f"{name}={value!r} must be a whole number of at least 1, or several")
    return list(dict.fromkeys(numbers))


def _metadata(pipe: Any, prompts: list[str], seed: int, call: dict[str, Any]) -> dict[str, Any]:
    model = find_denoiser(pipe)
    return {
        "model_class": type(model).__name__,
        "model_id": str(getattr(pipe, "name_or_path", "") or ""),
        "model_hash": weights_hash(model),
        "scheduler": type(pipe.scheduler).__name__,
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "seed": seed,
        "call": fingerprint(**call),
    }


def weights_hash(model: torch.nn.Module) -> str:
    """Hash of names, shapes and a few bfloat16-rounded values of every parameter: the same for
    any loading dtype."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta" and parameter.is_floating_point():
            few = parameter.detach().flatten()[:16].to("cpu", torch.float32).bfloat16().float()
            digest.update(few.numpy().tobytes())
    return digest.hexdigest()[:16]
