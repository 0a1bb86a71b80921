"""The page: its parts, and what they do."""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from importlib import resources
from typing import Any

import gradio as gr

from lesa.core.checks import whole
from lesa.errors import LesaError, is_out_of_memory
from lesa.play import views
from lesa.play.counts import Counts
from lesa.play.player import Made, Player

__all__ = ["Opening", "page"]

ONE_AT_A_TIME = "pipeline"  # what all events wait for
FORGET = 3600  # seconds after which a picture's file is removed


@dataclass(frozen=True)
class Opening:
    """What the page shows before anybody has typed: names, and the first values of its fields."""

    pipeline: str
    forecaster: str
    prompt: str
    seed: int
    full_steps: int
    frames: int = 1


def page(player: Player, opening: Opening) -> gr.Blocks:
    """The page of a pipeline, to be served; its fields do not send anything elsewhere."""
    title = f"lesa: {opening.pipeline}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(FORGET, FORGET)) as blocks:
        told = f"{html.escape(opening.pipeline)}, {player.num_steps} steps"
        gr.HTML(f"<h1>lesa</h1><p>{told}; accelerated by {html.escape(opening.forecaster)}</p>")
        prompt = gr.Textbox(opening.prompt, label="prompt", elem_id="prompt")
        with gr.Row(equal_height=True):
            seed = gr.Number(opening.seed, label="seed", precision=0, minimum=0, elem_id="seed")
            count = _slider(player.counts, opening.full_steps)
            button = gr.Button("Generate", variant="primary", elem_id="generate")
        shown = _results(opening.frames)
        frame = _frames(opening.frames)
        run = _handler(player)
        gr.on(
            [button.click, prompt.submit, seed.submit, count.release, frame.release],
            run,
            [prompt, seed, count, frame],
            [count, *shown],
            concurrency_id=ONE_AT_A_TIME,
            concurrency_limit=1,
            trigger_mode="always_last",
            api_name="generate",
        )
    return blocks


def style() -> str:
    """The style sheet of the page."""
    return resources.files("lesa.play").joinpath("page.css").read_text(encoding="utf-8")


def theme() -> gr.themes.Base:
    """Gradio's colours in the fonts of the visitor's system: none is fetched."""
    return gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )


def _slider(counts: Counts, value: int) -> gr.Slider:
    listed = ", ".join(map(str, counts.trained))
    info = f"trained for {listed}: the nearest is taken" if counts.trained else "any number"
    least, most = counts.ends
    movable = least < most
    return gr.Slider(
        least if movable else 1, most if movable else max(2, counts.num_steps), value,
        step=1, label="full steps", info=info, interactive=movable, scale=4, elem_id="full-steps",
    )  # fmt: skip


def _frames(count: int) -> gr.Slider:
    """Which frame of a video is looked at; not shown for a picture."""
    return gr.Slider(
        1, max(2, count), 1, step=1, label="frame of the error and of plain | accelerated",
        visible=count > 1, elem_id="frame",
    )  # fmt: skip


def _results(frames: int) -> list[Any]:
    """Where a handler's results go, in the order of `_shown`."""
    kind = "picture" if frames == 1 else "video"
    options: dict[str, Any] = {"interactive": False, "buttons": ["download", "fullscreen"]}
    with gr.Row(), gr.Column():
        told = gr.HTML(elem_id="numbers")
        steps = gr.HTML(elem_id="strip")
    with gr.Row():
        plain = gr.Image(label=f"plain {kind}", format="png", elem_id="plain", **options)
        fast = gr.Image(label=f"accelerated {kind}", format="png", elem_id="fast", **options)
        errors = gr.Image(label="error", format="png", elem_id="errors", **options)
    both = gr.ImageSlider(label="plain | accelerated", format="png", elem_id="both", **options)
    return [told, steps, plain, fast, errors, both]


def _handler(player: Player) -> Callable[..., Iterator[list[Any]]]:
    """Called with the fields; gives the results twice where the plain run has to be made first."""

    @_told_in_the_page
    def run(prompt: str, seed: float, count: float, frame: float = 1) -> Iterator[list[Any]]:
        text, number = player.checked(prompt, _whole(seed))
        wanted = player.counts.moved(_whole(count))
        place = whole("frame", _whole(frame), 1) - 1
        fast = player.accelerated(text, number, wanted)
        plain = player.kept(text, number)
        if plain is None:
            yield [wanted, *_shown(None, fast, place)]
            plain = player.plain(text, number)
        yield [wanted, *_shown(plain, fast, place)]

    return run


def _whole(value: Any) -> Any:
    """A number of a field, which may come as 7.0, as an int where it is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _shown(plain: Made | None, fast: Made, frame: int) -> list[Any]:
    """Values for the parts of `_results`."""
    found = [views.numbers(plain, fast), views.strip(fast.full_steps, fast.num_steps)]
    if plain is None:
        return [*found, None, _picture(fast), gr.update(value=None, label="error"), None]
    before, after = (views.frame_of(made.picture, frame) for made in (plain, fast))
    errors = views.error_map(before, after)
    label = f"error, brightest {100 * errors.brightest:.2g} % of the range"
    return [
        *found,
        _picture(plain),
        _picture(fast),
        gr.update(value=errors.picture, label=label),
        (views.still(before), views.still(after)),
    ]


def _picture(made: Made) -> Any:
    """A picture, or the file of a video."""
    if made.picture.ndim == 3:
        return views.still(made.picture)
    folder = os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir()
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".webp", delete=False) as file:
        file.write(views.moving(made.picture))
    return file.name


def _told_in_the_page(
    run: Callable[..., Iterator[list[Any]]],
) -> Callable[..., Iterator[list[Any]]]:
    """What is wrong becomes a notice of the page: one sentence, in which no HTML is obeyed."""

    @wraps(run)
    def told(*values: Any) -> Iterator[list[Any]]:
        try:
            yield from run(*values)
        except LesaError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise gr.Error(
                "The device has too little memory; start again with a lower --height and --width.",
                print_exception=False,
            ) from None

    return told
