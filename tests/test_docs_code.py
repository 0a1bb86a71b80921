"""Every block of code in README and docs runs; what would take long or need a GPU is parsed.

Python blocks of a page run in order, in one namespace. Commands are checked by their first word.
Before a block `<!-- test: parse -->` says that its `lesa` commands are only parsed by `make test`;
`make test-slow` runs them, and runs the Python blocks with the numbers that they show.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from doc_blocks import STAND_INS, blocks_of, check_command, commands, replaced
from test_docs import DOCUMENTS

import lesa
from lesa import testbed
from lesa.hooks import model_specs

SMALL = {  # numbers of a page -> those of `make test`
    "num_inference_steps=50": "num_inference_steps=8",
    "full_steps=(13, 10, 8)": "full_steps=(4, 3)",
    "full_steps=10": "full_steps=4",
    "target_speedup=4": "target_speedup=1.5",
    "budget=40": "budget=10",
    "[0, 5, 10, 20, 30, 40]": "[0, 2, 5]",
}
PROMPTS, MORE = testbed.captions(2, split="train"), testbed.captions(2, split="test")


BLOCKS = [block for page in DOCUMENTS for block in blocks_of(page)]
PYTHON = sorted({block.page for block in BLOCKS if block.language == "python"})
SHELL = [block for block in BLOCKS if block.language == "sh"]


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A working folder with a user's prompts, where diffusers' FLUX is as small as the embedded:
    64 x 64 pictures of captions with 20 tokens at most."""
    from diffusers import FluxPipeline

    original, encode = FluxPipeline.from_pretrained.__func__, FluxPipeline.encode_prompt

    def from_pretrained(cls: Any, *arguments: Any, **options: Any) -> Any:
        pipe = original(cls, *arguments, **options)
        pipe.default_sample_size = 16
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def encode_prompt(self: Any, *arguments: Any, **options: Any) -> Any:
        return encode(self, *arguments, **{**options, "max_sequence_length": 20})

    monkeypatch.setattr(FluxPipeline, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(FluxPipeline, "encode_prompt", encode_prompt)
    monkeypatch.setattr(model_specs, "_SPECS", model_specs.known_models())  # a page adds to them
    monkeypatch.chdir(tmp_path)
    for name, texts in {"prompts.txt": PROMPTS, "more.txt": MORE}.items():
        Path(name).write_text("\n".join(texts) + "\n")
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder `my-lesa`, trained in no time: for 10 of 50 full steps, without the long parts."""
    folder = tmp_path_factory.mktemp("trained") / "my-lesa"
    pipe, call = testbed.load(), testbed.settings()
    even = lesa.Schedule.fora(5)
    options = dict(schedule=even, polish=0, refine=0, call=call, progress=False)
    lesa.train(pipe, PROMPTS, call["num_inference_steps"], 10, **options).save_pretrained(folder)
    return folder


def test_every_language_is_known():
    """Nothing escapes: a block is Python, shell, YAML or a formula; none is only indented."""
    assert {block.language for block in BLOCKS} <= {"python", "sh", "text", "yaml"}
    assert {block.marker for block in BLOCKS} <= {"", "parse"}
    for page in DOCUMENTS:
        prose = re.sub(r"(?ms)^```.*?^```", "", page.read_text())
        assert not re.search(r"(?m)^\n {4}\S", prose), page


def run_python(page: Path, small: dict[str, str]) -> dict[str, Any]:
    """The namespace after all Python blocks of a page."""
    space: dict[str, Any] = {"FLUX": str(testbed._folder("flux"))}
    for block in blocks_of(page):
        if block.language == "python":
            code = replaced(replaced(block.text, STAND_INS), small)
            exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), space)
    return space


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_blocks_run(page, desk, trained):
    shutil.copytree(trained, "my-lesa")
    space = run_python(page, SMALL)
    if page.name == "README.md":
        check_pictures(space, desk)


def check_pictures(space: dict[str, Any], desk: Path) -> None:
    """The call without training and the trained one: both skip steps, the weights are bfloat16."""
    assert (desk / "first.png").stat().st_size > 1000
    assert space["pipe"].transformer.dtype == torch.bfloat16
    stats = lesa.stats(space["pipe"])
    assert (stats.full, stats.skipped) == (4, 4) and not stats.fallbacks


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_blocks_run_as_written(page, desk, trained):
    shutil.copytree(trained, "my-lesa")
    run_python(page, {})


def write_recipe(page: Path) -> None:
    """The recipe that a page shows, as a file."""
    for block in blocks_of(page):
        if block.language == "yaml":
            Path("my-recipe.yaml").write_text(replaced(block.text, STAND_INS))


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.name)
def test_shell_blocks(block, desk, trained):
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    shutil.copytree(trained, "my-lesa")
    write_recipe(block.page)
    for words in commands(block):
        check_command(words, run=block.marker != "parse")


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [b for b in SHELL if b.marker == "parse"], ids=lambda block: block.name
)
def test_parsed_blocks_run(block, desk):
    write_recipe(block.page)
    for words in commands(block):
        check_command(words, run=True)
