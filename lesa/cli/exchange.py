"""The commands that bring forecasters from and to other places: convert, export, push."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from lesa.cli import completion
from lesa.cli.options import FORECASTER, OUTPUT, Json
from lesa.cli.output import JsonCommand, check_json, console, emit, guarded, say
from lesa.errors import LesaError
from lesa.util.files import require_writable

__all__ = ["add_exchange"]

Folder = Annotated[
    str, typer.Argument(metavar="FOLDER", help="Folder or hub id of a trained forecaster.")
]
_MODELS = ("flux-dev", "flux-schnell", "qwen-image", "qwen-image-lightning", "hunyuan-video")
_ENGINES = ("cache-dit", "sglang", "json")


def add_exchange(app: typer.Typer) -> None:
    """Makes them commands of `lesa`."""
    for command in (convert, export, push):
        app.command(cls=JsonCommand)(guarded(command))


def convert(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A checkpoint of the LESA paper's authors.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the forecaster.", rich_help_panel=OUTPUT)],
    model: Annotated[
        str | None,
        typer.Option(
            help="What it was trained for, by default told from the file.",
            autocompletion=completion.among(_MODELS),
        ),
    ] = None,
    interval: Annotated[
        int | None, typer.Option(help="Every how many steps one is full: N of the file's name.")
    ] = None,
    first_enhance: Annotated[
        int | None, typer.Option(help="Full steps at the start: E of the file's name.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="In pixels, of the runs.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels, of the runs.")] = None,
    json: Json = None,
) -> None:
    """Make a forecaster of a checkpoint of the LESA paper's authors.

    Example: lesa convert predictor_flux_N7_E3.pt --out paper-lesa
    """
    from lesa.cli.run_inspect import describe
    from lesa.exchange.convert import convert as converted

    check_json(json)
    made = converted(
        file,
        model=model,
        interval=interval,
        first_enhance=first_enhance,
        height=height,
        width=width,
    )
    made.save_pretrained(require_writable(out))
    entry = made.calibrations[0]
    say(
        console(json),
        f"converted: {out}, for {made.metadata['converted_model']} with "
        f"{len(entry.schedule.full_steps)} of {entry.schedule.steps} steps in full",
    )
    emit(json, describe(made))


def export(
    folder: Folder,
    to: Annotated[
        str,
        typer.Option(
            help=f"The engine: {', '.join(_ENGINES)}.", autocompletion=completion.among(_ENGINES)
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the files.", rich_help_panel=OUTPUT)],
    full_steps: Annotated[
        str | None,
        typer.Option(
            help="Lists with so many full steps; all by default.", rich_help_panel=FORECASTER
        ),
    ] = None,
    engine_version: Annotated[
        str | None,
        typer.Option(help="Of the engine that will read them; by default the one installed here."),
    ] = None,
    request: Annotated[
        Path | None,
        typer.Option(help="SGLang: a schedule or capture of the server, or its fields as JSON."),
    ] = None,
    json: Json = None,
) -> None:
    """Write step lists for another engine: cache-dit, SGLang, or any that reads JSON.

    Example: lesa export my-lesa --to cache-dit --out masks
    """
    from lesa.cli.inputs import parse_counts
    from lesa.exchange.export import export as exported
    from lesa.exchange.sglang import read_request
    from lesa.forecasters.lesa import LesaForecaster

    check_json(json)
    made = exported(
        LesaForecaster.from_pretrained(folder),
        to,
        out,
        full_steps=None if full_steps is None else parse_counts(full_steps),
        engine_version=engine_version,
        request=None if request is None else read_request(request),
    )
    for path in made:
        say(console(json), f"written: {path}")
    emit(json, {"to": to, "files": [str(path) for path in made]})


def push(
    folder: Folder,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub.")],
    revision: Annotated[
        str | None, typer.Option(help="A branch, made where there is none; the main one.")
    ] = None,
    license: Annotated[str, typer.Option(help="Of the model card, such as mit.")] = "other",
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the pipeline, where training recorded none.")
    ] = None,
    picture: Annotated[
        list[Path] | None, typer.Option(help="For the model card; repeatable.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    pull_request: Annotated[
        bool, typer.Option("--pull-request", help="Open one instead of writing to the branch.")
    ] = False,
    json: Json = None,
) -> None:
    """Upload a forecaster with a model card to the Hugging Face Hub.

    Example: lesa push my-lesa owner/flux-lesa --license mit --picture compare/sheet.png
    """
    from lesa.cli.run_push import run_push

    check_json(json)
    if revision is not None and not re.fullmatch(r"[\w-][\w./-]*", revision):
        raise LesaError(f"revision={revision!r}: not the name of a branch; give one such as v2")
    at = run_push(
        folder,
        repo,
        pictures=picture or (),
        revision=revision,
        license=license,
        base_model=base_model,
        private=private or None,
        message=message,
        create_pr=pull_request,
    )
    say(console(json), f"pushed: {at}")
    emit(json, {"repo": repo, "commit": at})
