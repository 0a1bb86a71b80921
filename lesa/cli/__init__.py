"""The commands: each reads its input, calls the library once and prints what came out."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lesa import __version__, testbed
from lesa.cli import completion
from lesa.cli.checks import DRAWING, check_at_least, check_at_most, require_packages
from lesa.cli.exchange import add_exchange
from lesa.cli.inputs import NOT_EMBEDDED, TESTBED, embedded_name
from lesa.cli.names import choose
from lesa.cli.options import (
    OUTPUT,
    PROMPTS,
    Json,
    PipelineOption,
    one_pipeline,
    takes,
)
from lesa.cli.output import (
    INTERRUPTED,
    JsonCommand,
    check_json,
    complain,
    console,
    emit,
    guarded,
    say,
)
from lesa.cli.requests import CompareRequest, GenerateRequest, TrainRequest
from lesa.cli.run_play import add_play
from lesa.cli.usage import Commands
from lesa.util.files import require_writable, write_atomically

app = typer.Typer(
    name="lesa",
    cls=Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lesa {__version__}")
        raise typer.Exit


@app.callback()
def lesa(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Diffusion pipelines, several times faster: most denoising steps are forecast."""


@app.command(cls=JsonCommand)
@guarded
def demo(
    pipeline: Annotated[
        str | None,
        typer.Argument(
            metavar="PIPELINE",
            help="An embedded pipeline, flux by default.",
            autocompletion=completion.pipelines,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.", rich_help_panel=OUTPUT)] = Path(
        "lesa-demo"
    ),
    prompts_count: Annotated[
        int, typer.Option(help="Prompts to train on.", rich_help_panel=PROMPTS)
    ] = 16,
    json: Json = None,
    pipeline_option: PipelineOption = None,
) -> None:
    """Train on an embedded pipeline, skip most steps of unseen prompts, show the pictures.

    Example: lesa demo flux --out lesa-demo
    """
    name = one_pipeline(pipeline, pipeline_option) or TESTBED
    embedded = embedded_name(name) or choose(name, testbed.PIPELINES, "pipeline", what=NOT_EMBEDDED)
    check_at_least(1, prompts_count=prompts_count)
    check_at_most(10_000, prompts_count=prompts_count)
    require_packages(f"out={str(out)!r}", "torchmetrics", *DRAWING)
    check_json(json)
    require_writable(out)
    from lesa.cli.run_demo import run_demo

    emit(json, run_demo(embedded, out, prompts_count, console(json)))


@app.command(cls=JsonCommand)
@guarded
@takes(TrainRequest)
def train(request: TrainRequest) -> None:
    """Train a forecaster for a pipeline; after Ctrl-C the folder holds what was found.

    Example: lesa train testbed --prompts p.txt --full-steps 13,10,8 --out my-lesa
    """
    from lesa.cli.run_train import run_train

    emit(request.json, run_train(request, console(request.json)))


@app.command(cls=JsonCommand)
@guarded
@takes(GenerateRequest)
def generate(request: GenerateRequest) -> None:
    """Make pictures or videos, plain or accelerated, as PNG and mp4 files.

    Example: lesa generate testbed --forecaster my-lesa --prompts p.txt --out pics
    """
    from lesa.cli.run_generate import run_generate

    emit(request.json, run_generate(request, console(request.json)))


@app.command(cls=JsonCommand)
@guarded
@takes(CompareRequest)
def compare(request: CompareRequest) -> None:
    """Measure methods against the plain run of the same prompts and seeds.

    Example: lesa compare testbed --prompts p.txt --forecaster my-lesa --report r
    """
    from lesa.cli.run_compare import run_compare
    from lesa.cli.run_flops import run_flops
    from lesa.cli.submit import submit

    check_json(request.json)
    run = run_flops if request.flops_only else run_compare
    found = run(request, console(request.json))
    emit(request.json, found)
    submit(request.submit, found, console(request.json))


@app.command(cls=JsonCommand)
@guarded
def inspect(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Folder or hub id of a trained forecaster.")
    ],
    picture: Annotated[
        Path | None,
        typer.Option(help="Also draw the tables, and what they are worth, into this folder."),
    ] = None,
    json: Json = None,
) -> None:
    """Show a forecaster: its full steps, what they are worth, its tables, where it comes from.

    Example: lesa inspect my-lesa --picture tables
    """
    from lesa.cli.run_inspect import describe, draw_tables, print_forecaster
    from lesa.forecasters.lesa import LesaForecaster

    check_json(json)
    if picture is not None:
        require_packages(f"picture={str(picture)!r}", DRAWING[0])
        require_writable(picture, "picture")
    trained = LesaForecaster.from_pretrained(folder)
    print_forecaster(trained, console(json))
    for path, png in draw_tables(trained, picture).items():
        drawn = write_atomically(path, png)
        say(console(json), f"drawn: {drawn}")
    emit(json, describe(trained))


@app.command(cls=JsonCommand)
@guarded
def env(
    models: Annotated[
        bool, typer.Option("--models", help="List the denoiser classes instead.")
    ] = False,
    json: Json = None,
) -> None:
    """Print versions, devices and active backends, for a bug report.

    Example: lesa env --json
    """
    from lesa.cli.environment import environment, environment_table, model_rows, models_table

    check_json(json)
    if models:
        rows = model_rows()
        console(json).print(models_table(rows))
        emit(json, rows)
        return
    facts: dict[str, Any] = environment()
    console(json).print(environment_table(facts))
    emit(json, facts)


add_exchange(app)
add_play(app)


def main() -> None:
    """Entry point of `lesa`; an interrupt, also one outside of a command, ends with status 130."""
    try:
        app()
    except KeyboardInterrupt:
        complain("interrupted; what was finished is kept")
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
    # A caught interrupt that fell into an exec() (dataclasses, at import) still makes CPython
    # end itself by the signal, so its own way out is not taken.
    sys.stdout.flush()
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
