"""The page itself: what its fields do, what it tells of mistakes, whom it talks to."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from lesa.play.counts import Counts
from lesa.play.server import in_background, listening, quiet_gradio

gr = pytest.importorskip("gradio", reason="the extra play is not installed")
from lesa.play import page as pages  # noqa: E402

TEXT = "a large red circle on a white background"
OPENING = pages.Opening("testbed", "lesa-untrained", TEXT, 0, 3)
FRAME = "frame of the error and of plain | accelerated"


def slider(blocks: gr.Blocks, label: str) -> gr.Slider:
    (found,) = (b for b in blocks.blocks.values() if getattr(b, "label", None) == label)
    return found


def values(result: list) -> list:
    """What the parts of the page get; None where one is emptied."""
    return [each.get("value") if isinstance(each, dict) else each for each in result]


def test_the_accelerated_picture_comes_first_and_the_plain_one_once(player):
    run = pages._handler(player)
    first, second = run(TEXT, 5, 3, 1)
    count, numbers, strip, plain, fast, errors, both = values(first)
    assert (count, plain, errors, both) == (3, None, None, None) and fast.size == (384, 384)
    assert "running" in numbers and "3 of 6 steps in full" in strip
    count, numbers, strip, plain, fast, errors, both = values(second)
    assert "dB" in numbers and plain.size == errors.size == both[0].size == both[1].size
    (only,) = run(TEXT, 5.0, 2, 1)  # another count
    assert values(only)[0] == 2 and values(only)[3] is not None


def test_the_parts_of_the_page_are_as_many_as_the_results(player):
    blocks = pages.page(player, OPENING)
    (event,) = blocks.fns.values()
    (result, _) = pages._handler(player)(TEXT, 6, 1, 1)
    assert len(event.outputs) == len(result)
    assert (event.concurrency_limit, event.api_name) == (1, "generate")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (("", 0, 3, 1), "prompt='': it is empty"),
        ((TEXT, -1, 3, 1), "seed=-1"),
        ((TEXT, 0, 7, 1), "full steps=7: .* from 1 to"),
        ((TEXT, 0, None, 1), "full steps=None"),
        ((TEXT, 0, 3, 0), "frame=0"),
        ((TEXT, 0, 3, None), "frame=None"),
    ],
)
def test_a_mistake_is_a_notice_and_nothing_runs(player, fields, sentence, monkeypatch):
    monkeypatch.setattr(player, "_run", lambda *_: pytest.fail("it ran"))
    with pytest.raises(gr.Error) as told:
        next(pages._handler(player)(*fields))
    message = told.value.message.replace("&#x27;", "'")
    assert re.match(sentence, message) and not told.value.print_exception


def test_a_notice_obeys_no_html(player, monkeypatch):
    def refuse(*_: object) -> None:
        raise pages.LesaError("prompt='<img src=x>': no")

    monkeypatch.setattr(player, "checked", refuse)
    with pytest.raises(gr.Error) as told:
        next(pages._handler(player)(TEXT, 0, 3, 1))
    assert "<" not in told.value.message


def test_too_little_memory_is_told_and_other_faults_are_not_hidden(player, monkeypatch):
    for error, kind in ((RuntimeError("CUDA out of memory"), gr.Error), (RuntimeError("x"), None)):

        def fail(*_: object, error=error) -> None:
            raise error

        monkeypatch.setattr(player, "_run", fail)
        with pytest.raises(kind or RuntimeError, match="too little memory" if kind else "x"):
            next(pages._handler(player)(TEXT, 9, 3, 1))


@pytest.mark.parametrize(
    ("counts", "ends", "movable", "info"),
    [
        (Counts(50), (1, 50), True, "any number"),
        (Counts(50, (8, 10, 13)), (8, 13), True, "8, 10, 13"),
        (Counts(50, (10,)), (1, 50), False, "trained for 10"),
        (Counts(1), (1, 2), False, "any number"),
    ],
)
def test_the_slider_has_the_numbers_of_the_forecaster(player, counts, ends, movable, info):
    player.counts = counts
    found = slider(pages.page(player, OPENING), "full steps")
    assert (found.minimum, found.maximum) == ends and found.interactive is movable
    assert info in found.info


def test_a_video_moves_and_one_of_its_frames_is_compared(player, tmp_path, monkeypatch):
    """The frame chosen is the one of both pictures and of the error."""
    import numpy as np
    import torch
    from PIL import Image

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    plain, fast = (
        pages.Made(torch.stack([torch.full((3, 400, 400), v) for v in levels]), 1.0, (0,), 1)
        for levels in ((0.0, 0.4), (0.0, 0.5))
    )
    shown = values(pages._shown(plain, fast, 1))
    with Image.open(shown[2]) as image:
        assert image.n_frames == 2 and shown[2].startswith(str(tmp_path))
    assert [round(np.asarray(each).mean()) for each in shown[5]] == [102, 128]
    assert np.asarray(shown[4]).min() == 255  # all of it is the brightest
    assert slider(pages.page(player, OPENING), FRAME).visible is False
    moving = pages.Opening("testbed:hunyuan", "lesa", TEXT, 0, 3, frames=9)
    assert slider(pages.page(player, moving), FRAME).visible is True


@pytest.fixture
def served(player) -> Iterator[str]:
    """The address of a page that is served from a thread."""
    with (
        listening(0) as door,
        quiet_gradio(),
        in_background(pages.page(player, OPENING), door) as url,
    ):
        yield url


def test_what_is_served_loads_nothing_from_elsewhere(served):
    """No font, no script, no analytics; metadata for social networks is only text."""
    with urllib.request.urlopen(served) as answer:
        text, policy = answer.read().decode(), answer.headers["content-security-policy"]
    assert "lesa: testbed" in text
    assert "fonts.googleapis" not in text and "cdnjs" not in text
    loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', text)
    assert not loaded
    assert "default-src 'self'" in policy and "http" not in policy
    with urllib.request.urlopen(f"{served}/theme.css") as answer:
        style = answer.read()
    assert b"system-ui" in style and b"url(http" not in style and b"@import" not in style


def test_a_page_of_another_name_is_not_served(served):
    """Otherwise a site whose name leads to 127.0.0.1 could read the page."""
    request = urllib.request.Request(served, headers={"Host": "example.org"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 400


def test_a_program_can_ask_the_page(served):
    """By Gradio's own client: mistakes are told as in the browser."""
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(served, verbose=False, httpx_kwargs={"timeout": 120})
    count, numbers, strip, *pictures = client.predict(TEXT, 1, 2, 1, api_name="/generate")
    assert count == 2 and "dB" in numbers and "2 of 6 steps in full" in strip
    assert len(pictures) == 4 and all(pictures)
    with pytest.raises(AppError, match="it is empty"):
        client.predict(" ", 1, 2, 1, api_name="/generate")
