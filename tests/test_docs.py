"""What the documents name is there: paths in backticks, links and their headings."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import lesa

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
MADE = ("lesa-demo/", "gpu-evidence/", "profiles/")  # folders that commands write
WRITTEN = {"summary.json", "log.txt", "kernels.json", "skipped_step.json", "loop.json"}  # files


def prose(document: Path) -> str:
    """Without blocks of code, which show users' folders and programs."""
    return re.sub(r"(?ms)^\s*```.*?^\s*```", "", document.read_text())


def named(text: str) -> Iterator[str]:
    """`a/b`, `a/` and `a.py`; no commands, formulas or patterns."""
    for span in re.findall(r"`([^`\n]+)`", text):
        if re.fullmatch(r"[\w./-]+", span) and re.search(r"/|\.(py|md|json|toml|txt|sh)$", span):
            yield span


def heading(line: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """Where a link into a page can lead: headings, and names that the site documents there."""
    text = prose(page)
    headings = {heading(line) for line in text.splitlines() if line.startswith("#")}
    return headings | set(re.findall(r"(?m)^::: ([\w.]+)$", text))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_exists(document):
    bases = ROOT, ROOT / "lesa", ROOT / "benchmarks" / "results", document.parent
    absent = {
        path
        for path in named(prose(document))
        if not path.startswith(MADE)
        and path not in WRITTEN
        and not any((base / path).exists() for base in bases)
    }
    assert not absent


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def test_the_map_names_the_rooms_and_their_files():
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert len(text.splitlines()) <= 120
    rows = re.findall(r"(?m)^\| `(\w+)/` \| (.+?) \|", text)
    rooms = {path.parent.name for path in (ROOT / "lesa").glob("*/__init__.py")}
    assert {room for room, _ in rows} == rooms
    for room, files in rows:
        folder, named = ROOT / "lesa" / room, set(re.findall(r"`([^`]+)`", files))
        for name in named:
            place = folder / name
            assert place.is_dir() or place.with_suffix(".py").exists(), f"{room}: {name}"
        if room != "forecasters":  # one file per method
            assert {path.stem for path in folder.glob("*.py")} <= named | {"__init__"}


def test_the_reference_has_every_public_name():
    named = anchors(ROOT / "docs" / "reference.md")
    assert {f"lesa.{name}" for name in lesa.__all__} <= named


def test_the_first_screen_of_readme():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert lines.index("```python") < 30
    assert any(line.startswith("![") for line in lines[:25])
    assert "lesa.enable(pipe)" in "\n".join(lines[:40])
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 300_000, picture


def test_the_first_sentence_of_readme_is_what_was_measured():
    """At 10 of 50 full steps about five times faster, and nearer than every other method."""
    rows = json.loads((ROOT / "benchmarks/results/compare/flux.json").read_text())["rows"]
    lesa = next(row for row in rows if row["label"] == "lesa @10")
    own = ("lesa", "lesa-untrained", "lesa-disca", "lesa-cache-dit")
    others = [row for row in rows if row["method"] not in own]
    count = len({row["method"] for row in others})
    assert f"any of [{count} other methods]" in (ROOT / "README.md").read_text()
    assert 4.5 < lesa["speedup"] < 5.5
    assert all(row["psnr_mean"] < lesa["psnr_mean"] for row in others if row["full_steps"] <= 11.5)


def test_the_pages_of_results_are_what_the_committed_numbers_make():
    """After new measurements: python benchmarks/make_results.py."""
    pages = runpy.run_path(str(ROOT / "benchmarks" / "make_results.py"))["pages"]()
    for path, made in pages.items():
        assert (ROOT / path).read_text(encoding="utf-8") == made, path
    written = {path for path in pages if path.startswith("docs/results/")}
    folder = ROOT / "docs" / "results"
    assert {path.relative_to(ROOT).as_posix() for path in folder.glob("*")} == written
    index = pages["docs/results.md"]
    assert all(f"({path.removeprefix('docs/')})" in index for path in written)
    for path in (*written, "docs/results.md"):
        title, _, first, *_, last = pages[path].splitlines()
        assert title.startswith("# ") and "Made by" not in first, path
        assert last.startswith("*Made by "), path


def test_the_picture_of_readme_shows_the_committed_numbers(monkeypatch):
    """After a new comparison of sdxl: python benchmarks/make_picture.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = runpy.run_path(str(ROOT / "benchmarks" / "make_picture.py"))
    measured = made["read"](made["MEASURED"])
    labels = made["captions"](made["chosen"](measured), measured)
    with Image.open(made["OUT"]) as picture:
        assert picture.text["Description"] == made["as_text"](labels)
        assert picture.height % len(labels) == 0


def test_the_table_of_models_is_what_its_checks_found():
    """After new checks: python benchmarks/make_models_table.py --out docs/models.md."""
    made = runpy.run_path(str(ROOT / "benchmarks" / "make_models_table.py"))["table"]()
    assert made.strip() in (ROOT / "docs" / "models.md").read_text()
