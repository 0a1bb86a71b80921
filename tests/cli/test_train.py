"""`lesa train` with prompts to judge by, a budget and a target, on a saved pipeline."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from saved_pipelines import save
from typer.testing import CliRunner

from lesa import LesaForecaster, testbed
from lesa.cli import app

STEPS = 6


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    """`lesa train` on a tiny pipeline and 4 prompts, but for what is asked."""
    folder = tmp_path_factory.mktemp("pipeline")
    call = save("sd3", folder / "sd3")
    texts = folder / "prompts.txt"
    texts.write_text("\n".join(testbed.captions(4, split="train")))
    fixed = ["--num-inference-steps", str(STEPS), "--form", "table"]
    return ["train", str(folder / "sd3"), *call, "--prompts", str(texts), *fixed]


def train(command: list[str], out: Path, *options: object) -> tuple[LesaForecaster, str]:
    """What the command saved, and what it wrote on stderr."""
    words = [*command, "--out", out, *options]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return LesaForecaster.from_pretrained(out), result.stderr


def cost(told: str) -> float:
    """Plain generations in all, of the last line."""
    (found,) = re.findall(r"cost: [\d.]+ plain generations per prompt, ([\d.]+) in all", told)
    return float(found)


def test_a_file_of_validation_prompts_is_what_lists_are_judged_by(command, tmp_path):
    file = tmp_path / "v.json"
    file.write_text(json.dumps(testbed.captions(3, seed=5)))
    trained, told = train(command, tmp_path / "out", "--full-steps", 3, "--validation", file)
    (entry,) = trained.calibrations
    assert entry.worth.validated and entry.worth.pictures == 3
    assert trained.metadata["prompts"] == 4 + 3 and "too few to hold some out" not in told


@pytest.mark.parametrize("budget", ["9", "10h"])
def test_a_budget_is_kept(command, budget, tmp_path):
    """9 plain generations pay for the plain runs and one fit; 10 hours for races as well."""
    quick = ("--full-steps", 3, "--polish", 0)
    _, told = train(command, tmp_path, *quick, "--budget", budget)
    assert ("race of step lists" in told) == (budget == "10h")
    assert re.search(r"^estimate: at most \d+:\d+\S* for \d+ plain generations of ", told, re.M)
    assert cost(told) <= 9 if budget == "9" else cost(told) > 12


def test_a_target_finds_its_number_of_full_steps(command, tmp_path):
    trained, told = train(command, tmp_path, "--full-steps", 3, "--target-psnr", 12, "--polish", 0)
    (line,) = re.findall(r"^target: (\d) of 6 steps in full holds 12 dB at p10", told, re.M)
    (smallest, *_) = sorted(len(plan.full_steps) for plan in trained.calibrated)
    assert smallest == int(line)
    assert all(entry.worth.p10 >= 12 for entry in trained.calibrations)
