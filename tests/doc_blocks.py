"""Blocks of code in Markdown, and what can be told of a command without running it."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import typer
from typer.testing import CliRunner

from lesa.cli import app

ROOT = Path(__file__).parents[1]
STAND_INS = {  # what a user has -> what stands in for it here
    '"black-forest-labs/FLUX.1-dev"': "FLUX",  # the folder of the embedded FLUX
    '.to("cuda")': "",
    "my-pipeline": "testbed",
}


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


def check_command(words: list[str], *, run: bool) -> None:
    """What can be told of a command without a GPU, an installation or hours."""
    program, rest = words[0], words[1:]
    if program == "lesa":
        served = rest[0] == "play"  # until Ctrl-C; tests/play/test_browser.py does it
        run_lesa(rest) if run and not served else parse_lesa(rest)
    elif program in ("torchrun", "accelerate"):  # torchrun ... -m lesa ...
        parse_lesa(words[words.index("lesa") + 1 :])
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
