"""Prompt files as people have them."""

from __future__ import annotations

import sys

import pytest

from lesa.errors import LesaError
from lesa.util.prompts import check_text, read_prompts

PROMPT_FILES = {
    "drawbench.csv": 'Prompts,Category\nA red car.,Colors\n"A sign, ""Hi"".",Text\n',
    "drawbench.tsv": 'Prompts\tCategory\nA red car.\tColors\nA sign, "Hi".\tText\n',
    "parti.tsv": 'Prompt\tCategory\tChallenge\tNote\nA red car.\tA\tB\t\nA sign, "Hi".\tA\tB\n',
    "texts.json": '["A red car.", "A sign, \\"Hi\\"."]',
    "objects.json": '[{"id": 1, "prompt": "A red car."}, {"Prompts": "A sign, \\"Hi\\"."}]',
    "captions.csv": 'id,Text\n1,A red car.\n2,"A sign, ""Hi""."\n',
    "both.json": '[{"text": "no", "prompt": "A red car."}, {"caption": "A sign, \\"Hi\\"."}]',
    "coco.json": '{"images": [], "annotations": [{"id": 7, "caption": "A red car."},'
    ' {"caption": "A sign, \\"Hi\\"."}]}',
    "named.json": '{"prompts": ["A red car.", "A sign, \\"Hi\\"."]}',
    "mixed.jsonl": '{"prompt": "A red car."}\n\n"A sign, \\"Hi\\"."\n',
    "lines.txt": '\ufeffA red car.\n\n  A sign, "Hi".\n',
}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_prompt_files_as_they_are_published(name, tmp_path):
    path = tmp_path / name
    path.write_text(PROMPT_FILES[name], encoding="utf-8")
    assert read_prompts(path) == ["A red car.", 'A sign, "Hi".']


def test_a_tsv_prompt_may_begin_with_a_quote(tmp_path):
    path = tmp_path / "p.tsv"
    path.write_text('Prompt\tCategory\n"Hi" on a sign\tText\n"unclosed\tText\na cat\tA\n')
    assert read_prompts(path) == ['"Hi" on a sign', '"unclosed', "a cat"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "p.csv",
            "name,label\na,b\n",
            "looked for prompt, prompts, text, caption, found 'name', 'l",
        ),
        ("p.csv", "name,label\n", "found 'name', 'label'"),
        ("p.json", '{"prompt": "a"}', "an object with 'prompt'; looked for a list, or an object"),
        ("p.json", '{"annotations": [{"id": 3}]}', "looked for prompt, prompts, text, caption"),
        ("p.json", '["a", 3]', "3 is neither a text nor an object"),
        ("p.json", '[{"prompt": 3}]', "prompt holds a int, not a text"),
        ("p.json", '["a"', "cannot read"),
        ("p.json", "[" * 100_000, "recursion"),
        ("p.jsonl", "a cat\n", "line 1: Expecting value at character 1"),
        ("p.jsonl", '"a"\n  \n{bad\n', "line 3: Expecting property name"),
        ("p.csv", "Prompt\n\n", "holds no prompt"),
    ],
)
def test_other_prompt_files_get_one_sentence(name, text, words, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(LesaError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert (
        message.startswith(f"prompts={str(path)!r}: ")
        and words in message
        and "one prompt per line" in message
    )
    assert "\n" not in message


def test_a_column_of_a_parquet_file(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "p.parquet"
    pictures = arrow.array([b"1", b"2", b"3"])
    parquet.write_table(arrow.table({"image": pictures, "Caption": ["a", None, "b "]}), path)
    assert read_prompts(path) == ["a", "b"]
    parquet.write_table(arrow.table({"image": pictures}), path)
    with pytest.raises(LesaError, match="looked for prompt, .*, caption, found 'image'"):
        read_prompts(path)
    parquet.write_table(arrow.table({"text": [1, 2]}), path)
    with pytest.raises(LesaError, match="text holds a int, not a text"):
        read_prompts(path)
    path.write_text("no parquet")
    with pytest.raises(LesaError, match="cannot read it"):
        read_prompts(path)


def test_parquet_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(LesaError, match="needs pyarrow, not installed here; run `pip install"):
        read_prompts(tmp_path / "p.parquet")
    with pytest.raises(LesaError, match="does not exist"):
        read_prompts(tmp_path / "q.parquet")


def test_half_a_character(tmp_path):
    path = tmp_path / "p.json"
    path.write_text('["a \\ud83d cat"]')
    with pytest.raises(LesaError, match="its prompt='a .ud83d cat': it is no valid Unicode"):
        read_prompts(path)
    assert check_text("a \N{CAT} cat", "prompt") == "a \N{CAT} cat"
