"""`lesa compare --submit`: what the file holds, against its schema, and when none is written."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from json_schema import errors
from typer.testing import CliRunner

import lesa
from lesa import Prior, testbed
from lesa.cli import app, run_compare, submit
from lesa.cli.recipe import read_recipe, recipe_names
from lesa.errors import LesaError
from lesa.evaluation.submission import prompts_hash
from lesa.util.source import Source

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs/result.schema.json").read_text())
SUBMITTED = ROOT / "benchmarks/results/submitted"
SOURCE = Source(lesa.__version__, "0" * 40, "checkout")


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(testbed.captions(3, seed=9)))
    return path


@pytest.fixture
def clean(monkeypatch):
    """As in a checkout without changes, which that of whoever runs the tests may not be."""
    monkeypatch.setattr(submit, "require_source", lambda field: SOURCE)


def invoke(*args):
    return CliRunner().invoke(app, ["compare", *map(str, args)])


def refused(*args) -> str:
    """The one line of bad input, told before anything is loaded."""
    result = invoke(*args)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    *before, line = result.stderr.splitlines()
    assert all(re.fullmatch(r"load: [\d.]+ s", phase) for phase in before), result.stderr
    return line


def test_the_file_is_what_its_schema_and_the_table_say(clean, prompts, tmp_path):
    out, table = tmp_path / "made" / "result.json", tmp_path / "table.json"
    given = ("--methods", "fora,lesa-untrained", "--full-steps", "2", "--batch-size", "2")
    result = invoke(
        "schnell", "--prompts", prompts, *given, "--seed", "5", "--json", table, "--submit", out
    )
    assert result.exit_code == 0, result.output
    found, told = json.loads(out.read_text()), json.loads(table.read_text())
    assert [*errors(found, SCHEMA)] == []
    assert found["source"] == vars(SOURCE)
    assert found["pipeline"]["name"] == "testbed:schnell" and found["recipe"] is None
    assert set(found["pipeline"]["weights"]) >= {"transformer", "vae"}
    assert found["options"] == {"methods": "fora,lesa-untrained", "full_steps": "2"}
    assert (found["pairs"], found["seed"], found["batch_size"]) == (3, 5, 2)
    assert found["prompts"] == {"count": 3, "sha256": prompts_hash(told["prompts"])}
    assert {row["full_steps"] for row in found["rows"]} == {2}
    for row, other in zip(found["rows"], told["rows"], strict=True):
        psnr = other["psnr_mean"], other["psnr_p10"], other["psnr_min"]
        assert (row["psnr"]["mean"], row["psnr"]["p10"], row["psnr"]["minimum"]) == psnr
        assert (row["seconds"], row["label"]) == (other["seconds"], other["label"])
        assert 0 < row["cpu_seconds"] < found["plain"]["cpu_seconds"]
        assert (row["lpips"] is None) == ("lpips" in found["missing"])
    assert found["missing"]["peak_bytes"].startswith("cpu does not count it")
    assert not any(str(tmp_path) in part for part in (out.read_text(), str(found["options"])))
    assert errors_of(found, "rows") and errors_of(found, "source")


def errors_of(found: dict, name: str) -> list[str]:
    """What the schema says of a file without a part of it."""
    return [*errors({key: value for key, value in found.items() if key != name}, SCHEMA)]


@pytest.mark.parametrize("path", sorted(SUBMITTED.glob("*.json")), ids=lambda path: path.stem)
def test_a_committed_file_is_as_described_and_of_the_committed_prompts(path):
    found = json.loads(path.read_text())
    assert [*errors(found, SCHEMA)] == []
    if found["pipeline"]["name"].startswith("testbed:"):
        captions = (SUBMITTED / "captions.txt").read_text().splitlines()
        assert found["prompts"] == {"count": len(captions), "sha256": prompts_hash(captions)}
    else:
        assert found["pairs"] >= 8


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("source", "commit"), ""),
        (("date",), ""),
        (("prompts", "sha256"), ""),
        (("call", "num_inference_steps"), -1),
        (("rows", 0, "lpips", "mean"), -1.0),
        (("rows", 0, "ssim_mean"), -2.0),
    ],
)
def test_a_file_that_was_edited_is_not_as_described(place, value):
    found = json.loads((SUBMITTED / "flux.json").read_text())
    *way, last = place
    part = found
    for name in way:
        part = part[name]
    part[last] = value
    assert len([*errors(found, SCHEMA)]) == 1


def test_prompts_are_told_apart_by_their_hash():
    assert prompts_hash(["a", "ü"]) == hashlib.sha256('["a", "ü"]'.encode()).hexdigest()
    assert prompts_hash(["a\nb"]) != prompts_hash(["a", "b"])


@pytest.mark.parametrize("what", ["there", "folder", "flops", "unwritable"])
def test_a_file_that_cannot_be_written_is_refused(what, clean, prompts, tmp_path):
    out, given = tmp_path / "result.json", ("schnell", "--prompts", prompts)
    words = "it is there already; give another name"
    if what == "there":
        out.write_text("mine")
    elif what == "folder":
        out.mkdir()
        words = "it is a folder; give a file name"
    elif what == "flops":
        given, words = ("--flops-only", "--model", "sdxl"), "--flops-only measures nothing"
    else:
        (tmp_path / "file").write_text("")
        out, words = tmp_path / "file" / "result.json", "cannot write into the folder"
    line = refused(*given, "--submit", out)
    assert line.startswith("lesa: submit=") and words in line
    assert what != "there" or out.read_text() == "mine"


def test_changed_source_is_refused_before_anything_is_loaded(monkeypatch, prompts, tmp_path):
    def changed(field):
        raise LesaError(f"{field}: the source differs from its commit (lesa/a.py); commit it")

    monkeypatch.setattr(submit, "require_source", changed)
    out = tmp_path / "new" / "result.json"
    assert "differs from its commit" in refused("schnell", "--prompts", prompts, "--submit", out)
    assert not out.parent.exists()


def test_source_that_changes_meanwhile_leaves_the_table_and_no_file(monkeypatch, tmp_path):
    """What was measured hours long is still told, but not as this commit's."""
    out = tmp_path / "result.json"
    monkeypatch.setattr(submit, "require_source", lambda field: SOURCE)
    other = {"submission": {"source": vars(SOURCE) | {"commit": "1" * 40}}}
    with pytest.raises(LesaError, match="another commit was checked out meanwhile"):
        submit.submit(out, other, None)
    assert not out.exists()


@pytest.mark.parametrize(
    "given", [(), ("--batch-size", "2"), ("--guidance-scale", "1"), ("--num-inference-steps", "3")]
)
def test_a_recipe_is_named_with_what_it_was_not_run_with(given, clean, prompts, tmp_path):
    """By its file's hash; options that the recipe has and the command line replaced are listed."""
    recipe = tmp_path / "small.yaml"
    recipe.write_text("pipeline: testbed:schnell\nbatch-size: 4\nguidance-scale: 0.0\n")
    with recipe.open("a") as file:
        file.write("num-inference-steps: [4, 8]\n")
    found = subject("--config", recipe, "--prompts", prompts, *given).recipe
    changed = [option.removeprefix("--").replace("-", "_") for option in given[::2]]
    assert (found["name"], found["own"], found["overridden"]) == ("small.yaml", False, changed)
    assert found["sha256"] == hashlib.sha256(recipe.read_bytes()).hexdigest()


def test_lesas_own_recipe_on_another_pipeline_says_so(clean, prompts):
    found = subject("testbed", "--config", "flux.1-dev", "--prompts", prompts)
    assert (found.pipeline, found.recipe["name"]) == ("testbed:flux", "flux.1-dev")
    assert found.recipe["own"] and "pipeline" in found.recipe["overridden"]


def test_lesas_own_recipes_are_run_as_they_are(monkeypatch):
    """Nothing that a recipe says is taken for an option that was given in its place."""
    asked = []
    monkeypatch.setattr(
        "lesa.cli.run_compare.run_compare", lambda request, _: asked.append(request)
    )
    for name in recipe_names():
        invoke("--config", name, "--prompts", "p.txt")
        steps = int(read_recipe(name).options["num_inference_steps"])
        found = submit._recipe(asked[-1], steps)
        assert (found["name"], found["own"], found["overridden"]) == (name, True, [])
        assert "num_inference_steps" in submit._recipe(asked[-1], steps + 1)["overridden"]
    assert len(asked) == len(recipe_names()) > 10


def test_a_forecaster_is_named_by_the_hashes_of_its_files(clean, prompts, tmp_path):
    folder = tmp_path / "forecaster"
    forecaster = lesa.LesaForecaster()
    forecaster.save_pretrained(folder)
    found = subject("schnell", "--prompts", prompts, "--forecaster", folder).forecaster
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    assert found == {"name": "lesa", "sha256": weights, "config_sha256": config}
    assert submit._forecaster("lesa-untrained", Prior()) == {
        "name": Prior().name,
        "sha256": None,
        "config_sha256": None,
    }


class Asked(Exception):
    """Ends a command once it was read."""


def subject(*args):
    """What a command would submit, without running it."""
    found = []

    def keep(*parts):
        found.append(submit.subject_of(*parts))
        raise Asked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_compare, "subject_of", keep)
        result = invoke(*args, "--submit", "never-written.json")
    assert isinstance(result.exception, Asked), result.output
    return found[0]
