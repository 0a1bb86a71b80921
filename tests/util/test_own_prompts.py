"""The calibration prompts that come with lesa."""

from __future__ import annotations

import unicodedata

import pytest

from lesa.errors import LesaError
from lesa.util.prompts import own_prompts, read_other_prompts, read_prompts


def scripts(text: str) -> set[str]:
    """The writing systems of a text."""
    return {unicodedata.name(letter).split()[0] for letter in text if letter.isalpha()}


def test_they_are_a_hundred_different_sentences_in_several_languages():
    prompts = own_prompts()
    assert len(prompts) == len({prompt.casefold() for prompt in prompts}) == 100
    assert all(prompt == prompt.strip() and 10 < len(prompt) < 120 for prompt in prompts)
    found = set().union(*map(scripts, prompts))
    assert {"LATIN", "CJK", "HIRAGANA", "CYRILLIC", "ARABIC", "HANGUL", "DEVANAGARI"} <= found
    openings = {prompt.split()[0] + prompt.split()[1] for prompt in prompts if " " in prompt}
    assert len(openings) > 80  # not one sentence with its words exchanged


def test_parts_of_them_are_named_by_number(tmp_path, monkeypatch):
    prompts = own_prompts()
    assert read_prompts("lesa") == prompts and read_prompts("lesa:16") == prompts[:16]
    assert read_prompts("lesa:17-48") == prompts[16:48]
    assert read_other_prompts("lesa:17-20", "validation", prompts[:16], "fitted too")
    with pytest.raises(LesaError, match="validation='lesa:16-20': 1 of its prompts are fitted"):
        read_other_prompts("lesa:16-20", "validation", prompts[:16], "fitted too")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lesa").write_text("a file of this name")
    assert read_prompts("lesa") == ["a file of this name"]


@pytest.mark.parametrize("name", ["lesa:0", "lesa:101", "lesa:9-3", "lesa:x", "lesa:", "lesa:-3"])
def test_a_part_that_is_not_there(name):
    with pytest.raises(LesaError, match=f"^prompts='{name}': .*; give lesa"):
        read_prompts(name)
