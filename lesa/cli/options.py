"""The options that several commands share, and how a request's fields become options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

Request = TypeVar("Request")

Embedded = "A folder, a hub id, or an embedded one: testbed, testbed:qwen."
Pipeline = Annotated[str, typer.Argument(help=Embedded)]
Prompts = Annotated[Path, typer.Option("--prompts", help="Text file, one prompt per line.")]
Steps = Annotated[
    int | None, typer.Option(help="Steps of the sampler; the embedded pipeline's own, else 50.")
]
Counts = Annotated[
    str | None,
    typer.Option(
        "--full-steps",
        help="Steps that run the whole model, 13,10,8 by default; one number for --form paper.",
    ),
]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="Write JSON to this .json file; alone or '-': to stdout."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; CUDA where there is any.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Attention = Annotated[
    str | None,
    typer.Option("--attention-backend", help="diffusers' attention: flash, sage, ...; see env."),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the denoiser's repeated blocks (torch.compile).")
]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale of the pipeline.")]
Size = Annotated[int | None, typer.Option(help="In pixels; the pipeline's own by default.")]
Seed = Annotated[int, typer.Option(help="Prompt i is drawn with seed + i.")]
Batch = Annotated[int, typer.Option(min=1, help="Prompts at a time.")]


def takes(
    request: type[Request],
) -> Callable[[Callable[[Request], None]], Callable[..., None]]:
    """Gives a command one option for each field of a dataclass, and the command the object.

    Fields are annotated as typer's options are. A class's own fields come before those that it
    inherits.
    """
    hints = get_type_hints(request, include_extras=True)
    known = {field.name: field for field in fields(request)}  # type: ignore[arg-type]
    order = [name for cls in request.__mro__ for name in cls.__dict__.get("__annotations__", ())]

    def parameter(name: str) -> inspect.Parameter:
        default = known[name].default
        return inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is MISSING else default,
            annotation=hints[name],
        )

    signature = inspect.Signature([parameter(name) for name in dict.fromkeys(order)])

    def wrap(function: Callable[[Request], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**options: Any) -> None:
            function(request(**options))

        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = hints
        return command

    return wrap
