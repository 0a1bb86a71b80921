"""The options that several commands share, and how a request's fields become options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from lesa.cli import completion
from lesa.errors import LesaError

Request = TypeVar("Request")

PROMPTS, FORECASTER, PIPELINE, OUTPUT = "Prompts", "Forecaster", "Pipeline", "Output"
ALIAS = "pipeline_option"  # the parameter behind `--pipeline`

Pipeline = Annotated[
    str | None,
    typer.Argument(
        metavar="PIPELINE",
        help="A folder, a hub id, or an embedded one: testbed, testbed:qwen.",
        show_default=False,
        autocompletion=completion.pipelines,
    ),
]
PipelineOption = Annotated[
    str | None,
    typer.Option("--pipeline", hidden=True, autocompletion=completion.pipelines),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="A line each, or CSV, TSV, JSON, JSONL, parquet; lesa:16: the first 16 of lesa's own.",
        rich_help_panel=PROMPTS,
    ),
]
NegativePrompt = Annotated[
    str | None, typer.Option(help="What not to show, for every prompt.", rich_help_panel=PROMPTS)
]
Steps = Annotated[
    int | None,
    typer.Option(
        help="Steps of the sampler: the forecaster's, the embedded pipeline's, else 50.",
        rich_help_panel=PIPELINE,
    ),
]
Counts = Annotated[
    str | None,
    typer.Option(
        "--full-steps",
        help="Steps that run the whole model, by default 13,10,8 (--form paper or disca: 10).",
        rich_help_panel=FORECASTER,
    ),
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="Write JSON to this .json file; alone or '-': to stdout.",
        rich_help_panel=OUTPUT,
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Another sampler: ddim, euler, dpm++, unipc, flow-euler.",
        rich_help_panel=PIPELINE,
        autocompletion=completion.schedulers,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, ...; CUDA where there is any.", rich_help_panel=PIPELINE),
]
Dtype = Annotated[str | None, typer.Option(help="bf16, fp16 or fp32.", rich_help_panel=PIPELINE)]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attention-backend",
        help="diffusers' attention: flash, sage, ...; see env.",
        rich_help_panel=PIPELINE,
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile", help="Compile the denoiser's repeated blocks.", rich_help_panel=PIPELINE
    ),
]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale of the pipeline.", rich_help_panel=PIPELINE)
]
Size = Annotated[
    int | None,
    typer.Option(help="In pixels; by default the pipeline's own.", rich_help_panel=PIPELINE),
]
Frames = Annotated[int | None, typer.Option(help="Frames of a video.", rich_help_panel=PIPELINE)]
Further = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any other argument of the pipeline; repeatable.",
        rich_help_panel=PIPELINE,
    ),
]
Seed = Annotated[
    int, typer.Option(help="Prompt i is drawn with seed + i.", rich_help_panel=PIPELINE)
]
Batch = Annotated[int, typer.Option(help="Prompts at a time.", rich_help_panel=PIPELINE)]


def one_pipeline(argument: str | None, option: str | None) -> str | None:
    """The pipeline that is named by the argument, or by `--pipeline`.

    Raises: LesaError where they name two.
    """
    if argument is not None and option is not None and argument != option:
        raise LesaError(
            f"pipeline={argument!r}: --pipeline names another one, {option!r}; give one of them"
        )
    return option if argument is None else argument


def takes(
    request: type[Request],
) -> Callable[[Callable[[Request], None]], Callable[..., None]]:
    """Gives a command one option for each field of a dataclass, and the command the object.

    Fields are annotated as typer's options are; one that is not set from outside has none. A
    class's own fields come before those that it inherits. The pipeline may also be named by the
    hidden option `--pipeline`.
    """
    hints = get_type_hints(request, include_extras=True) | {ALIAS: PipelineOption}
    known = {field.name: field for field in fields(request) if field.init}  # type: ignore[arg-type]
    named = [name for cls in request.__mro__ for name in cls.__dict__.get("__annotations__", ())]
    order = [name for name in named if name in known]

    def parameter(name: str) -> inspect.Parameter:
        default = known[name].default if name in known else None
        return inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is MISSING else default,
            annotation=hints[name],
        )

    signature = inspect.Signature([parameter(name) for name in dict.fromkeys([*order, ALIAS])])

    def wrap(function: Callable[[Request], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**options: Any) -> None:
            options["pipeline"] = one_pipeline(options["pipeline"], options.pop(ALIAS))
            function(request(**options))

        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = hints
        return command

    return wrap
