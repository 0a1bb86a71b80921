"""`lesa play`: a page on which plain and accelerated runs are seen side by side."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lesa.cli import completion
from lesa.cli.checks import check_at_least, require_packages
from lesa.cli.options import FORECASTER, OUTPUT, PROMPTS, Steps, takes
from lesa.cli.output import JsonCommand, check_json, console, emit, guarded, say
from lesa.cli.run_request import RunRequest
from lesa.util.prompts import check_text

if TYPE_CHECKING:
    from rich.console import Console

    from lesa.cli.saved import Saved
    from lesa.play.counts import Counts


PROMPT = "a red fox in the snow"


@dataclass(frozen=True, kw_only=True)
class PlayRequest(RunRequest):
    """`lesa play`."""

    prompt: Annotated[
        str | None, typer.Option(help="The first prompt of the page.", rich_help_panel=PROMPTS)
    ] = None
    forecaster: Annotated[
        str,
        typer.Option(
            help="Folder, hub id, or lesa-untrained, fora, ...",
            rich_help_panel=FORECASTER,
            autocompletion=completion.forecasters,
        ),
    ] = "lesa-untrained"
    full_steps: Annotated[
        int | None,
        typer.Option(
            help="Where the slider stands first; by default nearest to a fifth of the steps.",
            rich_help_panel=FORECASTER,
        ),
    ] = None
    num_inference_steps: Steps = None
    port: Annotated[
        int,
        typer.Option(help="Of 127.0.0.1; 0: any free one.", rich_help_panel=OUTPUT),
    ] = 7860
    batch_size: int = field(init=False, default=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, num_inference_steps=self.num_inference_steps)
        if self.prompt is not None:
            check_text(self.prompt, "prompt")

    def first_prompt(self, saved: Saved) -> str:
        """The one given, else one of the kind that an embedded pipeline knows, else a fox."""
        if self.prompt is not None or saved.embedded is None:
            return self.prompt or PROMPT
        from lesa import testbed

        return testbed.prompts(saved.embedded, 1)[0]


def add_play(app: typer.Typer) -> None:
    """The command `play`."""

    @app.command(cls=JsonCommand)
    @guarded
    @takes(PlayRequest)
    def play(request: PlayRequest) -> None:
        """Open a page: plain and accelerated side by side, at any number of full steps.

        Example: lesa play testbed --forecaster my-lesa
        """
        run_play(request, console(request.json))


def run_play(request: PlayRequest, console: Console) -> None:
    """Load the pipeline and serve its page until Ctrl-C.

    Raises: LesaError for bad input, before the pipeline is loaded where it can be told.
    """
    require_packages(f"port={request.port}", "gradio", extra="play")
    saved = request.saved()
    forecaster, settings, counts = _checked(request, saved)
    from lesa.play.server import address, listening, quiet_gradio, serve

    with listening(request.port) as door, quiet_gradio():
        page, player, facts = _made(request, saved, forecaster, settings, counts)
        facts |= {"url": address(door)}
        by = facts["forecaster"]
        say(console, f"{facts['url']} shows {request.named}, accelerated by {by}; Ctrl-C ends it")
        emit(request.json, facts)
        sys.stdout.flush()  # whoever reads it waits for the address
        try:
            serve(page, door)
        finally:
            player.close()


def _checked(request: PlayRequest, saved: Saved) -> tuple[Any, dict[str, Any], Counts]:
    """The forecaster, the arguments of the pipeline's call and the full steps to choose from."""
    from lesa.cli.calls import check_one_each
    from lesa.cli.inputs import load_forecaster
    from lesa.play.counts import counts_of

    forecaster = load_forecaster(request.forecaster)
    steps = request.num_inference_steps
    settings = request.settings(saved, forecaster, num_inference_steps=steps)
    check_one_each(settings, "the page shows")
    counts = counts_of(forecaster, settings["num_inference_steps"])
    if request.full_steps is not None:
        counts.check(request.full_steps, "full-steps")
    request.check_target()
    check_json(request.json)
    return forecaster, settings, counts


def _made(
    request: PlayRequest, saved: Saved, forecaster: Any, settings: dict[str, Any], counts: Counts
) -> tuple[Any, Any, dict[str, Any]]:
    """The page of the loaded pipeline, its player after a first run, and what there is to say."""
    from lesa.play.page import Opening, page
    from lesa.play.player import Player

    prompt = request.first_prompt(saved)
    pipe = request.load(settings, [prompt], forecaster)
    request.full_step.warm_up(pipe, [prompt], settings)
    player = Player(pipe, forecaster, settings, counts)
    first = request.full_steps or counts.default
    frames = player.warm_up(prompt, request.seed)
    facts = {
        "pipeline": request.named,
        "forecaster": forecaster.name,
        "num_inference_steps": counts.num_steps,
        "full_steps": first,
        "trained_for": list(counts.trained),
        "frames": frames,
    }
    opening = Opening(request.named, forecaster.name, prompt, request.seed, first, frames)
    return page(player, opening), player, facts
