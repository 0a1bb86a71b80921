"""`lesa compare`: what is compared with what, measured on a pipeline or counted on a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lesa.cli.output import progress
from lesa.errors import LesaError
from lesa.util.files import read_prompts, require_writable

if TYPE_CHECKING:
    from lesa.cli.full_step import FullStep
    from lesa.evaluation.method import Bench, Method

CALIBRATION = 8  # captions of an embedded pipeline where no file gives others
FULL_STEPS = "10"


def run_compare(
    pipeline: str,
    prompts: Path,
    given: Mapping[str, Any],
    *,
    full_steps: str | None,
    methods: str,
    forecaster: str | None,
    calibration: Path | None,
    searched: bool,
    judges: Sequence[str],
    limit: bool,
    report: Path | None,
    seed: int,
    batch_size: int,
    device: str | None,
    dtype: str | None,
    full_step: FullStep,
    console: Console,
) -> dict[str, Any]:
    """Measure methods on a pipeline, print the table and return all of it.

    `given` are arguments of `pipe(...)`; those that are None stay the pipeline's own.

    Raises: LesaError for bad input, before the pipeline is loaded where it can be told.
    """
    from lesa.cli.inputs import (
        call_settings,
        check_target,
        default_device,
        load_forecaster,
        load_pipeline,
        parse_counts,
    )
    from lesa.evaluation import compare
    from lesa.evaluation.judges import named
    from lesa.evaluation.limit import add_limits
    from lesa.evaluation.method import Bench
    from lesa.evaluation.report import rich_table, write_report

    settings = call_settings(pipeline, given)
    steps = settings["num_inference_steps"]
    counts = parse_counts(FULL_STEPS if full_steps is None else full_steps, steps)
    texts = read_prompts(prompts)
    others = calibration_prompts(pipeline, calibration, texts)
    check_target(pipeline, device, dtype, full_step)
    if report is not None:
        require_writable(report, "report")
    trained = load_forecaster(forecaster) if forecaster else None
    check_methods(methods, Bench(steps, forecaster=trained))
    asked = [named(name, device or default_device()) for name in judges]
    pipe = load_pipeline(pipeline, device=device, dtype=dtype, full_step=full_step)
    _check_frames(pipe, settings)
    full_step.warm_up(pipe, texts[:batch_size], settings)
    bench = Bench(steps, pipe, settings, others, trained, seed)
    contenders = prepare(methods, counts, bench, searched)
    batches = -(-len(texts) // batch_size)
    with progress("compare", batches * (len(contenders) + 1)) as advance:
        result = compare(
            pipe,
            texts,
            contenders,
            settings,
            seed=seed,
            batch_size=batch_size,
            judges=asked,
            advance=advance,
        )
    if limit:
        rows = sum(method.name == "lesa" for method in contenders)
        with progress("limit", rows * len(texts)) as advance:
            add_limits(pipe, result, contenders, advance)
    result.notes += [*left_out(methods, bench), *full_step.notes()]
    console.print(rich_table(result.rows, result.plain_seconds, steps))
    for note in result.notes:
        console.print(note, markup=False, soft_wrap=True)
    if report is not None:
        console.print(f"report: {write_report(result, report)['report.html']}")
    return result.to_dict() | asdict(full_step)


def run_flops(
    model: str, full_steps: str | None, console: Console, **changes: int | None
) -> list[dict[str, Any]]:
    """Count the operations of a published model, print the table and return its rows.

    `changes` are num_steps, height, width and frames; those that are None are as in the paper.
    """
    from lesa.cli.inputs import parse_counts, quieten
    from lesa.evaluation.flops import flops_rows, flops_table, published

    counts = None if full_steps is None else parse_counts(full_steps)
    quieten()
    rows = flops_rows(model, full_steps=counts, **changes)
    console.print(flops_table(rows))
    console.print(published(model).note, soft_wrap=True)
    return rows


def check_methods(methods: str, bench: Bench) -> None:
    """Raises LesaError for what is wrong with the names whatever the pipeline is."""
    from lesa.evaluation.methods import PEERS, parse

    names = [name.strip() for name in methods.split(",") if name.strip()]
    doubtful = [name for name in names if name not in PEERS]
    if names != ["all"] and (doubtful or not names):
        parse(doubtful, bench)


def calibration_prompts(pipeline: str, file: Path | None, measured: Sequence[str]) -> list[str]:
    """Prompts that methods may be prepared on: a file's, else an embedded pipeline's own.

    Raises: LesaError if one of the file's is measured too.
    """
    from lesa import testbed
    from lesa.cli.inputs import embedded_name

    if file is None:
        embedded = embedded_name(pipeline)
        own = testbed.prompts(embedded, CALIBRATION, seed=0, split="train") if embedded else []
        return [prompt for prompt in own if prompt not in measured]
    prompts = read_prompts(file)
    if shared := set(prompts).intersection(measured):
        raise LesaError(
            f"calibration: {len(shared)} of its prompts are measured too, e.g. {min(shared)!r};"
            " remove them from one of the files"
        )
    return prompts


def prepare(methods: str, counts: Sequence[int], bench: Bench, searched: bool) -> list[Method]:
    """The contenders, calibrated where they need it, under a progress bar."""
    from lesa.evaluation.methods import build_all, parse

    names = parse(methods, bench)
    found: dict[str, Method] = {}
    with progress("prepare", len(counts) * len(names)) as advance:
        for count, name in product(counts, names):
            built = build_all([name], [count], bench, searched=searched)
            found |= {method.label: method for method in built}
            advance(f"{name} @{count}")
    return list(found.values())


def left_out(methods: str, bench: Bench) -> list[str]:
    """What "all" does not hold on this bench, and why, a line each."""
    from lesa.evaluation import methods as known

    return list(known.left_out(known.NAMES, bench).values()) if methods.strip() == "all" else []


def _check_frames(pipe: Any, settings: Mapping[str, Any]) -> None:
    if "num_frames" in settings and "num_frames" not in inspect.signature(pipe).parameters:
        raise LesaError(f"frames: {type(pipe).__name__} makes no video; leave it out")
