"""`lesa compare`: what is compared with what, measured on a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lesa.cli.calls import full_steps_of
from lesa.cli.checks import DRAWING, require_packages
from lesa.cli.names import choose
from lesa.cli.output import say
from lesa.cli.requests import CompareRequest
from lesa.cli.submit import subject_of
from lesa.util.files import require_writable
from lesa.util.progress import Progress
from lesa.util.prompts import read_other_prompts, read_prompts

if TYPE_CHECKING:
    from lesa.evaluation.comparison import Comparison
    from lesa.evaluation.failures import Failures
    from lesa.evaluation.judges import Judge
    from lesa.evaluation.method import Bench, Method
    from lesa.evaluation.submission import Subject

CALIBRATION = 8  # captions of an embedded pipeline where no file gives others


@dataclass(frozen=True)
class _Inputs:
    """What a request names, read before the pipeline is loaded."""

    settings: dict[str, Any]
    counts: tuple[int, ...]
    prompts: list[str]
    calibration: list[str]
    forecaster: Any
    judges: list[Judge]
    subject: Subject | None = None


def run_compare(request: CompareRequest, console: Console) -> dict[str, Any]:
    """Measure methods on a pipeline, print the table and return all of it.

    Raises: LesaError for bad input, before the pipeline is loaded where it can be told.
    """
    with Progress().bar("load", 0):
        inputs = _read(request)
        settings, steps = inputs.settings, inputs.settings["num_inference_steps"]
        pipe = request.load(settings, inputs.prompts, inputs.forecaster)
        request.full_step.warm_up(pipe, inputs.prompts[: request.batch_size], settings)
    from lesa.evaluation.method import Bench

    bench = Bench(steps, pipe, settings, inputs.calibration, inputs.forecaster, request.seed)
    result = _measure(request, inputs, bench)
    missing = left_out(request.methods, bench)
    result.notes += [*one_line(missing), *request.full_step.notes()]
    _show(result, request.report, console)
    found = result.to_dict() | {"left_out": missing} | asdict(request.full_step)
    if inputs.subject is not None:
        from lesa.evaluation.submission import document

        found["submission"] = document(inputs.subject, pipe, result)
    return found


def _read(request: CompareRequest) -> _Inputs:
    from lesa.cli.calls import check_one_each
    from lesa.cli.inputs import default_device, load_forecaster, parse_counts
    from lesa.evaluation.judges import named
    from lesa.evaluation.method import Bench

    require_packages(f"methods={request.methods!r}", "torchmetrics")
    if request.report is not None:
        require_packages(f"report={str(request.report)!r}", *DRAWING)
    assert request.prompts is not None  # or the request is for --flops-only
    saved = request.saved()
    texts = read_prompts(request.prompts)
    others = calibration_prompts(saved.embedded, request.calibration, texts)
    forecaster = load_forecaster(request.forecaster) if request.forecaster else None
    settings = request.settings(saved, forecaster, num_inference_steps=request.num_inference_steps)
    check_one_each(settings, "compare makes")
    steps = settings["num_inference_steps"]
    counts = parse_counts(_full_steps(request, forecaster, steps), steps)
    request.check_target()
    if request.report is not None:
        require_writable(request.report, "report")
    bench = Bench(steps, saved.outline(), calibration=others, forecaster=forecaster)
    check_methods(request.methods, bench)
    judges = [named(name, request.device or default_device()) for name in request.judge or ()]
    subject = subject_of(request, saved, steps, others, forecaster)
    return _Inputs(settings, counts, texts, others, forecaster, judges, subject)


def _full_steps(request: CompareRequest, forecaster: Any, steps: int) -> str:
    """The given numbers of full steps, else the forecaster's nearest to a fifth, else the untrained
    method's."""
    from lesa.forecasters.prior import default_count

    if request.full_steps is not None:
        return request.full_steps
    return str(full_steps_of(forecaster, steps) or default_count(steps))


def _measure(request: CompareRequest, inputs: _Inputs, bench: Bench) -> Comparison:
    """Prepare the contenders and run them, and where it is asked for the bound of lesa's rows."""
    from lesa.evaluation import compare
    from lesa.evaluation.failures import Failures
    from lesa.evaluation.limit import add_limits

    failures = Failures()
    contenders = prepare(request.methods, inputs.counts, bench, request.searched, failures)
    result = compare(
        bench.pipe,
        inputs.prompts,
        contenders,
        inputs.settings,
        seed=request.seed,
        batch_size=request.batch_size,
        judges=inputs.judges,
        progress=Progress(),
    )
    result.notes += failures.notes()
    if request.limit:
        add_limits(bench.pipe, result, contenders, Progress())
    return result


def _show(result: Comparison, report: Path | None, console: Console) -> None:
    from lesa.evaluation.report import rich_table, write_report

    steps = result.settings["num_inference_steps"]
    console.print(rich_table(result.rows, result.plain_seconds, steps))
    files = {}
    if report is not None:
        with Progress().bar("report", 0):
            files = write_report(result, report)
    for note in result.notes:  # the report's too
        say(console, note)
    if files:
        say(console, f"report: {files['report.html']}")


def check_methods(methods: str, bench: Bench) -> None:
    """Raises LesaError for what is wrong with the names whatever weights the pipeline has.

    bench: its pipeline is the saved one's outline, or None.
    """
    from lesa.evaluation.methods import BY_CLASS, NAMES, PEERS, parse
    from lesa.forecasters.published import canonical

    names = [canonical(name.strip()) for name in methods.split(",") if name.strip()]
    for name in names:
        choose(name, ["all", *NAMES], "methods")
    by_class = BY_CLASS if bench.pipe is not None else ()
    told = [name for name in names if name not in PEERS or name in by_class]
    if names != ["all"] and (told or not names):
        parse(methods if "all" in names or not names else told, bench)


def calibration_prompts(
    embedded: str | None, file: Path | None, measured: Sequence[str]
) -> list[str]:
    """Prompts that methods may be prepared on: a file's, else an embedded pipeline's own.

    Raises: LesaError if one of the file's is measured too.
    """
    from lesa import testbed

    if file is None:
        own = testbed.prompts(embedded, CALIBRATION, seed=0, split="train") if embedded else []
        return [prompt for prompt in own if prompt not in measured]
    return read_other_prompts(file, "calibration", measured, "measured too")


def prepare(
    methods: str, counts: Sequence[int], bench: Bench, searched: bool, failures: Failures
) -> list[Method]:
    """The contenders, calibrated where they need it, under a progress bar; `failures` gets those
    that fail.

    Raises: LesaError if all of them do.
    """
    from lesa.evaluation.methods import build_all, parse

    names = parse(methods, bench)
    found: dict[str, Method] = {}
    with Progress().bar("prepare", len(counts) * len(names)) as bar:
        for count, name in product(counts, names):
            label = f"{name} @{count}"
            make = partial(build_all, [name], [count], bench, searched=searched)
            built = failures.attempt(label, "in its preparation", make) or []
            found |= {method.label: method for method in built}
            bar.advance(1, label)
    if not found:
        raise failures.nothing_left()
    return list(found.values())


def left_out(methods: str, bench: Bench) -> dict[str, str]:
    """What "all" does not hold on this bench: why not, by name."""
    from lesa.evaluation.methods import NAMES, unfit

    if methods.strip() != "all":
        return {}
    return {name: why for name in NAMES if (why := unfit(name, bench)) is not None}


def one_line(missing: Mapping[str, str]) -> list[str]:
    """One line of what is left out; those with the same reason share it."""
    if not missing:
        return []
    reasons: dict[str, list[str]] = {}
    for name, why in missing.items():
        reasons.setdefault(why.removesuffix("; leave it out"), []).append(name)
    listed = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
    count = f"{len(missing)} method{'s do' if len(missing) > 1 else ' does'}"
    return [f"{count} not apply: {listed}"]
