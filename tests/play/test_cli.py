"""`lesa play`: what it refuses before it loads anything, and what it tells."""

from __future__ import annotations

import json
import socket
from importlib.util import find_spec
from itertools import chain

import processes
import pytest
from typer.testing import CliRunner

import lesa
from lesa.cli import app, checks, inputs
from lesa.play import server

COMMON = ("play", "testbed", "--num-inference-steps", "6", "--port", "0")
needs_gradio = pytest.mark.skipif(
    find_spec("gradio") is None, reason="the extra play is not installed"
)


def refused(*words: object) -> str:
    """The sentence of a command that ends with status 2."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture
def nothing_loads(monkeypatch):
    monkeypatch.setattr(inputs, "load_pipeline", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr(server, "serve", lambda *_: pytest.fail("it was served"))


@pytest.fixture
def other_model(tmp_path):
    forecaster = lesa.LesaForecaster(metadata={"model_class": "QwenImageTransformer2DModel"})
    forecaster.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_the_missing_extra(nothing_loads, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    line = refused(*COMMON)
    assert "gradio, not installed" in line and "pip install gradio" in line
    assert "extra play" in line


@needs_gradio
def test_a_port_in_use(nothing_loads):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = refused("play", "testbed", "--port", port)
    assert line == f"lesa: port={port}: it is in use; give another, or 0 for any free one"


@needs_gradio
def test_a_forecaster_of_another_model(nothing_loads, other_model):
    line = refused(*COMMON, "--forecaster", other_model)
    assert "trained for model_class='QwenImageTransformer2DModel'" in line


@needs_gradio
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--full-steps", "7"), "full-steps=7: 7 of 6 steps is not possible"),
        (("--full-steps", "0"), "full-steps=0: not a whole number >= 1"),
        (("--prompt", ""), "prompt='': it is empty"),
        (("--prompt", "  "), "prompt='': it is empty"),
        (("--port", "70000"), "port=70000: no port; give 1 to 65535"),
        (("--seed", "-1"), "seed=-1: out of range"),
        (("--forecaster", "fora,taylor-1"), "several names; give one"),
        (("--set", "num_images_per_prompt=2"), "num_images_per_prompt=2': the page shows one"),
        (("--num-inference-steps", "0"), "num-inference-steps=0: below 1"),
        (("--json", "/dev/null/x.json"), "json='/dev/null': cannot write"),
    ],
)
def test_bad_input_is_one_sentence(nothing_loads, options, sentence):
    numbers = {"--num-inference-steps": "6", "--port": "0"} | dict([options])
    assert sentence in refused("play", "testbed", *chain.from_iterable(numbers.items()))


def test_several_processes_do_not_open_it(nothing_loads, monkeypatch):
    for name, value in processes.environment(0, 2).items():
        monkeypatch.setenv(name, value)
    assert refused(*COMMON).startswith("lesa: WORLD_SIZE=2: lesa play runs in one process")


def test_it_has_no_option_without_effect():
    result = CliRunner().invoke(app, ["play", "--batch-size", "2"])
    assert result.exit_code == 2 and "--batch-size" in result.stderr


@needs_gradio
def test_what_is_served_and_told(monkeypatch):
    """The whole way, but for the waiting."""
    seen = {}

    def serve(page, door):
        seen.update(page=page, url=server.address(door))

    monkeypatch.setattr(server, "serve", serve)
    words = (*COMMON, "--forecaster", "fora", "--full-steps", "2", "--prompt", "a red circle")
    result = CliRunner().invoke(app, [*words, "--json", "-"], catch_exceptions=False)
    assert result.exit_code == 0 and seen["url"] in result.stderr
    assert json.loads(result.stdout) == {
        "pipeline": "testbed", "forecaster": "fora", "num_inference_steps": 6, "full_steps": 2,
        "trained_for": [], "frames": 1, "url": seen["url"],
    }  # fmt: skip
    shown = {getattr(block, "value", None) for block in seen["page"].blocks.values()
             if isinstance(getattr(block, "value", None), str | int)}  # fmt: skip
    assert {"a red circle", 2, 0} <= shown
