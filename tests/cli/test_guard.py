"""Guards on the command line: what is shown of one, what is refused, what an export tells."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from lesa import LesaForecaster, Schedule
from lesa.cli import app
from lesa.cli.recipe import read_recipe
from lesa.errors import LesaError
from lesa.forecasters.guard import Guard

STEPS = 10
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]
FULL, MORE = (0, 2, 5, 8), (0, 2, 3, 5, 6, 8)


@pytest.fixture
def folder(tmp_path):
    """A forecaster of two lists, of which the first one is guarded."""
    made = LesaForecaster("table", num_steps=STEPS)
    entry = made.recommend(Schedule.explicit(FULL, STEPS), SIGMAS)
    entry.guard = Guard(2, 0.25, Schedule.explicit(MORE, STEPS), share=0.25)
    made.recommend(Schedule.explicit((0, 4), STEPS), SIGMAS)
    made.save_pretrained(tmp_path / "lesa")
    return tmp_path / "lesa"


def lesa(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_inspect_shows_it(folder):
    shown = lesa("inspect", folder)
    assert shown.exit_code == 0, shown.output
    steps = "".join("█" if step in MORE else "·" for step in range(STEPS))
    (line,) = [line for line in shown.output.splitlines() if " spend " in line]
    assert steps in line and "step 2 is above 0.25" in line
    first, second = json.loads(lesa("inspect", folder, "--json").stdout)["calibrated"]
    assert first["guard"]["extra_steps"] == [3, 6] and first["guard"]["limit"] == 0.25
    assert first["speedup"] == pytest.approx(STEPS / 4.5) and second["guard"] is None


def test_an_export_of_lists_alone_tells_what_is_lost(folder, tmp_path):
    made = lesa("export", folder, "--to", "cache-dit", "--out", tmp_path / "masks")
    assert made.exit_code == 0, made.output
    assert "guard: cache-dit runs lists without theirs, 4-of-10 (spend)" in made.stderr
    made = lesa("export", folder, "--to", "json", "--out", tmp_path / "lists")
    assert made.exit_code == 0 and "guard" not in made.stderr
    found = json.loads((tmp_path / "lists" / "step-lists.json").read_text())
    assert found["lists"][0]["guard"]["full_steps"] == list(MORE)


def test_off_in_a_recipe_is_not_the_truth_value_of_yaml(tmp_path):
    file = tmp_path / "recipe.yaml"
    for text, told in (("off", "off"), ("spend", "spend"), ('"route"', "route")):
        file.write_text(f"guard: {text}\n")
        assert read_recipe(file).options["guard"] == told
    file.write_text("guard: on\n")
    with pytest.raises(LesaError, match="guard=True is not a text"):
        read_recipe(file)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--guard", "on"], "guard='on': unknown; choose from off, route, spend"),
        (["--guard", "route"], "guard='route': the forecaster lesa-table has guard='spend'; leave"),
        (["--guard", "spend", "--full-steps", 2], "guard='spend': only 4 full steps have it, not"),
    ],
)
def test_what_a_forecaster_has_not_is_refused(folder, tmp_path, more, told):
    words = ["generate", "flux", "--forecaster", folder, "--prompt", "a fox"]
    words += ["--num-inference-steps", STEPS, "--out", tmp_path / "out"]
    found = lesa(*words, *more)
    assert found.exit_code == 2, found.output
    (line,) = found.stderr.splitlines()
    assert line.startswith(f"lesa: {told}") and not (tmp_path / "out").exists()
