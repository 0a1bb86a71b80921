"""`lesa compare`: what is compared with what, measured on a pipeline or counted on a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lesa.cli.output import progress
from lesa.cli.requests import CompareRequest
from lesa.errors import LesaError
from lesa.util.files import read_prompts, require_writable

if TYPE_CHECKING:
    from lesa.evaluation.comparison import Comparison
    from lesa.evaluation.judges import Judge
    from lesa.evaluation.method import Bench, Method

CALIBRATION = 8  # captions of an embedded pipeline where no file gives others
FULL_STEPS = "10"


@dataclass(frozen=True)
class _Inputs:
    """What a request names, read before the pipeline is loaded."""

    pipeline: str
    settings: dict[str, Any]
    counts: tuple[int, ...]
    prompts: list[str]
    calibration: list[str]
    forecaster: Any
    judges: list[Judge]


def run_compare(request: CompareRequest, console: Console) -> dict[str, Any]:
    """Measure methods on a pipeline, print the table and return all of it.

    Raises: LesaError for bad input, before the pipeline is loaded where it can be told.
    """
    from lesa.evaluation.method import Bench

    inputs = _read(request)
    settings, steps = inputs.settings, inputs.settings["num_inference_steps"]
    pipe = request.load(inputs.pipeline)
    _check_frames(pipe, settings)
    request.full_step.warm_up(pipe, inputs.prompts[: request.batch_size], settings)
    bench = Bench(steps, pipe, settings, inputs.calibration, inputs.forecaster, request.seed)
    result = _measure(request, inputs, bench)
    result.notes += [*left_out(request.methods, bench), *request.full_step.notes()]
    _show(result, request.report, console)
    return result.to_dict() | asdict(request.full_step)


def _read(request: CompareRequest) -> _Inputs:
    from lesa.cli.inputs import default_device, load_forecaster, parse_counts
    from lesa.evaluation.judges import named
    from lesa.evaluation.method import Bench

    pipeline, prompts = request.pipeline, request.prompts
    assert pipeline is not None and prompts is not None  # or the request is for --flops-only
    settings = request.settings(
        pipeline, num_inference_steps=request.num_inference_steps, num_frames=request.frames
    )
    steps = settings["num_inference_steps"]
    counts = parse_counts(FULL_STEPS if request.full_steps is None else request.full_steps, steps)
    texts = read_prompts(prompts)
    others = calibration_prompts(pipeline, request.calibration, texts)
    request.check_target(pipeline)
    if request.report is not None:
        require_writable(request.report, "report")
    forecaster = load_forecaster(request.forecaster) if request.forecaster else None
    check_methods(request.methods, Bench(steps, forecaster=forecaster))
    judges = [named(name, request.device or default_device()) for name in request.judge or ()]
    return _Inputs(pipeline, settings, counts, texts, others, forecaster, judges)


def _measure(request: CompareRequest, inputs: _Inputs, bench: Bench) -> Comparison:
    """Prepare the contenders and run them, and where it is asked for the bound of lesa's rows."""
    from lesa.evaluation import compare
    from lesa.evaluation.limit import add_limits

    contenders = prepare(request.methods, inputs.counts, bench, request.searched)
    batches = -(-len(inputs.prompts) // request.batch_size)
    with progress("compare", batches * (len(contenders) + 1)) as advance:
        result = compare(
            bench.pipe,
            inputs.prompts,
            contenders,
            inputs.settings,
            seed=request.seed,
            batch_size=request.batch_size,
            judges=inputs.judges,
            advance=advance,
        )
    if request.limit:
        rows = sum(method.name == "lesa" for method in contenders)
        with progress("limit", rows * len(inputs.prompts)) as advance:
            add_limits(bench.pipe, result, contenders, advance)
    return result


def _show(result: Comparison, report: Path | None, console: Console) -> None:
    from lesa.evaluation.report import rich_table, write_report

    steps = result.settings["num_inference_steps"]
    console.print(rich_table(result.rows, result.plain_seconds, steps))
    for note in result.notes:
        console.print(note, markup=False, soft_wrap=True)
    if report is not None:
        console.print(f"report: {write_report(result, report)['report.html']}")


def run_flops(request: CompareRequest, console: Console) -> list[dict[str, Any]]:
    """Count the operations of a published model, print the table and return its rows.

    Steps, size and frames that are not given are as in the paper.
    """
    from lesa.cli.inputs import parse_counts, quieten
    from lesa.evaluation.flops import flops_rows, published
    from lesa.evaluation.flops_table import flops_table

    assert request.model is not None  # of a request for --flops-only
    counts = None if request.full_steps is None else parse_counts(request.full_steps)
    quieten()
    rows = flops_rows(
        request.model,
        full_steps=counts,
        num_steps=request.num_inference_steps,
        height=request.height,
        width=request.width,
        frames=request.frames,
    )
    console.print(flops_table(rows))
    console.print(published(request.model).note, soft_wrap=True)
    return rows


def check_methods(methods: str, bench: Bench) -> None:
    """Raises LesaError for what is wrong with the names whatever the pipeline is."""
    from lesa.evaluation.methods import PEERS, parse

    names = [name.strip() for name in methods.split(",") if name.strip()]
    doubtful = [name for name in names if name not in PEERS]
    if names != ["all"] and (doubtful or not names):
        parse(doubtful or methods, bench)


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
            f"calibration={str(file)!r}: {len(shared)} of its prompts are measured too, e.g."
            f" {min(shared)!r}; remove them from one of the files"
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
        raise LesaError(
            f"frames={settings['num_frames']}: {type(pipe).__name__} makes no video; leave it out"
        )
