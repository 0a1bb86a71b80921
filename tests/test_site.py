"""The documentation site: every message is on its page, every page in its navigation."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import lesa
from lesa.cli import app
from lesa.util.prompts import read_prompts

ROOT = Path(__file__).parents[1]
REPEATING = {  # files in which an error hands on the words of another one
    "lesa/cli/requests.py",
    "lesa/cli/run_generate.py",
    "lesa/engine/config.py",
    "lesa/engine/controller.py",
    "lesa/engine/plans.py",
    "lesa/integrations/stream.py",
}


@pytest.fixture(scope="module")
def site() -> Iterator[Any]:
    """The modules of docs/site/, which is no package."""
    folder = str(ROOT / "docs" / "site")
    sys.path.insert(0, folder)
    yield SimpleNamespace(messages=import_module("messages"), raised=import_module("raised"))
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def sources(site) -> Any:
    return site.raised.Sources()


@pytest.fixture(scope="module")
def messages(sources) -> list[Any]:
    return sources.messages()


def pattern(text: str) -> str:
    """What a message of this template looks like."""
    return "".join(
        ".*" if part[:1] == "‹" else re.escape(part) for part in re.split("(‹[^›]*›)", text)
    )


def test_every_error_has_a_message_with_words(site, sources):
    """None is a mere variable, but those that repeat another error's words."""
    made = [*sources.raised()]
    written = sum(
        len(re.findall(r"\b(?:LesaError|RunError)\(", path.read_text()))
        for folder in site.raised.SOURCES
        for path in (ROOT / folder).rglob("*.py")
    )
    classes = 2  # class LesaError(...) and class RunError(...)
    assert len(made) == written - classes
    mute = {source.file for node, source in made if not [*sources.told(node, source)]}
    assert mute <= REPEATING


def test_the_page_holds_every_message(site, messages):
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    reader = site.messages
    made = reader.write_messages(page, messages)
    assert reader.MARK in page and reader.MARK not in made
    for message in messages:
        for text in (message.text, *(t for texts in message.fills.values() for t in texts)):
            assert reader.marked(text) in made, (message.file, text)


def test_every_explanation_belongs_to_a_message(site, messages):
    known = site.messages.explanations()
    used = {told for message in messages for told in site.messages.explained(message, known)}
    assert not {part for part, told in known.items() if told not in used}


def mistakes(folder: Path) -> list[Any]:
    """Calls that users get wrong, in several rooms."""
    pipe = object()
    return [
        lambda: lesa.Schedule("often", 5),
        lambda: lesa.Schedule.explicit([1, 2], 5),
        lambda: lesa.Taylor(order=9),
        lambda: lesa.LesaConfig(full_steps=0),
        lambda: lesa.LesaConfig(target_psnr=900.0),
        lambda: lesa.enable(pipe, "no-such-method"),
        lambda: lesa.enable(pipe),
        lambda: lesa.stats(pipe),
        lambda: lesa.train(pipe, [], 50, 10),
        lambda: lesa.train(pipe, ["a"], 50, 60),
        lambda: lesa.train(pipe, ["a"], 50, 10, budget="soon"),
        lambda: read_prompts(folder / "prompts.txt"),
        lambda: lesa.LesaForecaster.from_pretrained(folder / "none"),
        lambda: lesa.testbed.load("no-such-pipeline"),
    ]


def test_what_users_get_to_see_is_found(messages, tmp_path):
    """By the same words, whatever is filled in; templates of hardly any words do not count."""
    worded = [
        m.text for m in messages if len(re.findall(r"\w{3,}", re.sub("‹.*?›", "", m.text))) > 1
    ]
    known = [re.compile(pattern(text), re.DOTALL) for text in worded]
    seen = []
    for mistake in mistakes(tmp_path):
        with pytest.raises(lesa.LesaError) as caught:
            mistake()
        seen.append(str(caught.value))
    generate = ["generate", "nowhere", "--prompt", "a", "--out", str(tmp_path / "out")]
    for words in (generate, ["train", "--config", "nothing.yaml"]):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2, words
        seen.append(result.stderr)
    assert not [text for text in seen if not any(form.search(text) for form in known)]


def pages_of(nav: Any) -> list[str]:
    """The pages that a navigation names."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages_of(part)]


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    nav = yaml.safe_load(text[text.index("\nnav:") :])["nav"]
    named = pages_of(nav)
    docs = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert len(named) == len({*named})
    assert docs <= {*named}
    assert all((ROOT / "docs" / page).exists() or (ROOT / page).exists() for page in named)
