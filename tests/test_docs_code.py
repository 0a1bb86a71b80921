"""Every block of code in README and docs runs; what would take long or need a GPU is parsed.

Python blocks of a page run in order, in one namespace. Commands are checked by their first word.
Before a block `<!-- test: parse -->` says that its `lesa` commands are only parsed by `make test`;
`make test-slow` runs them, and runs the Python blocks with the numbers that they show.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from test_docs import DOCUMENTS, ROOT
from typer.testing import CliRunner

import lesa
from lesa import testbed
from lesa.cli import app

STAND_INS = {  # what a user has -> what stands in for it here
    '"black-forest-labs/FLUX.1-dev"': "FLUX",  # the folder of the embedded FLUX
    '.to("cuda")': "",
    "my-pipeline": "testbed",
}
SMALL = {  # numbers of a page -> those of `make test`
    "num_inference_steps=50": "num_inference_steps=8",
    "full_steps=(13, 10, 8)": "full_steps=(4, 3)",
    "full_steps=10": "full_steps=4",
    "[0, 5, 10, 20, 30, 40]": "[0, 2, 5]",
}
PROMPTS = testbed.captions(2, split="train")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, line, language, text and the words of its marker."""

    page: Path
    line: int
    language: str
    text: str
    marker: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    pattern = r"(?ms)(?:^<!-- test: ([\w ]+) -->\n)?^```(\w*)\n(.*?)^```"
    return [
        Block(page, text[: found.start(2)].count("\n") + 1, found[2], found[3], found[1] or "")
        for found in re.finditer(pattern, text)
    ]


BLOCKS = [block for page in DOCUMENTS for block in blocks_of(page)]
PYTHON = sorted({block.page for block in BLOCKS if block.language == "python"})
SHELL = [block for block in BLOCKS if block.language == "sh"]


def commands(block: Block) -> list[list[str]]:
    """The words of each command, without comments and without variables set in front."""
    lines = block.text.replace("\\\n", " ").splitlines()
    split = [shlex.split(replaced(line, STAND_INS), comments=True) for line in lines]
    bare = [[*words] for words in split if words]
    for words in bare:
        while re.match(r"\w+=", words[0]):
            del words[0]
    return bare


def replaced(text: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        text = text.replace(old, new)
    return text


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
    monkeypatch.chdir(tmp_path)
    for name in ("prompts.txt", "more.txt"):
        Path(name).write_text("\n".join(PROMPTS) + "\n")
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder `my-lesa`, trained in no time: for 10 of 50 full steps, without the long parts."""
    folder = tmp_path_factory.mktemp("trained") / "my-lesa"
    pipe, call = testbed.load(), testbed.settings()
    even = lesa.Schedule.every(5)
    options = dict(schedule=even, polish=0, refine=0, call=call, progress=False)
    lesa.train(pipe, PROMPTS, call["num_inference_steps"], 10, **options).save_pretrained(folder)
    return folder


def test_every_language_is_known():
    """Nothing escapes: a block is Python, shell, a formula or a drawing; none is only indented."""
    assert {block.language for block in BLOCKS} <= {"python", "sh", "text", "mermaid"}
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
def test_python_blocks_run(page, desk):
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
def test_python_blocks_run_as_written(page, desk):
    run_python(page, {})


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.name)
def test_shell_blocks(block, desk, trained):
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    shutil.copytree(trained, "my-lesa")
    for words in commands(block):
        check_command(words, run=block.marker != "parse")


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [b for b in SHELL if b.marker == "parse"], ids=lambda block: block.name
)
def test_parsed_blocks_run(block, desk):
    for words in commands(block):
        check_command(words, run=True)


def check_command(words: list[str], *, run: bool) -> None:
    """What can be told of a command without a GPU, an installation or hours."""
    program, rest = words[0], words[1:]
    if program == "lesa":
        run_lesa(rest) if run else parse_lesa(rest)
    elif program == "make":
        targets = re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text())
        assert set(rest) <= set(targets), words
    elif program == "pip" and rest[0] == "install":
        check_install(rest[1:])
    elif program in ("nsys", "ncu") or words[:2] == ["pip", "download"]:
        pass  # bash has read the line
    elif words[:2] == ["python", "-m"]:
        assert find_spec(rest[1]), words
    else:
        check_script(words)


def run_lesa(words: list[str]) -> None:
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, (words, result.output)


def parse_lesa(words: list[str]) -> None:
    """click reads all arguments and options, and calls nothing."""
    group = typer.main.get_command(app)
    context = group.make_context("lesa", [*words])
    name, command, rest = group.resolve_command(context, words)
    command.make_context(name, rest, parent=context)


def check_install(words: list[str]) -> None:
    """Folders and extras are there."""
    text = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    extras = re.findall(r"(?m)^(\w+) = \[", text.split("\n[")[0])
    for word in words:
        if not word.startswith("-") and not word.endswith(("site", ".whl")):  # made by a download
            folder, _, rest = word.partition("[")
            assert (ROOT / folder / "pyproject.toml").exists(), word
            assert not rest or set(rest.rstrip("]").split(",")) <= set(extras), word


def check_script(words: list[str]) -> None:
    """A script of the repository, or a program of its environment, and the flags that it knows."""
    program, *rest = words
    if program.startswith(".venv/bin/"):
        tool = program.rpartition("/")[2]
        assert tool in (ROOT / "pyproject.toml").read_text(), words
        return
    if program == "python":
        program, *rest = rest
    script = ROOT / program
    assert script.exists(), words
    known = script.read_text()
    if script.suffix == ".sh":
        subprocess.run(["bash", "-n", str(script)], check=True)
        known += (ROOT / "benchmarks" / "_profile_target.py").read_text()
    for flag in (word for word in rest if word.startswith("--")):
        assert f'"{flag.partition("=")[0]}"' in known, flag
