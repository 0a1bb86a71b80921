"""`lesa inspect`: what the lists of a forecaster are worth, as a table, a plot and JSON."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from lesa import LesaForecaster, Schedule
from lesa.cli import app
from lesa.cli.run_inspect import worth_table
from lesa.forecasters.worth import Worth

WORTHS = {
    13: Worth(59.21, 53.14, 41.2, 24, True, share=0.012),
    10: Worth(53.6, 47.4, 33.87, 24, True, share=0.012),
}
LEVELS = [1 - s / 50 for s in range(51)]


def forecaster(worths: dict[int, Worth | None]) -> LesaForecaster:
    made = LesaForecaster("table", uses_latent=False)
    for count, worth in worths.items():
        full = [round(index * 49 / (count - 1)) for index in range(count)]
        made.recommend(Schedule.explicit(full, 50), LEVELS).worth = worth
    return made


def table(worths: dict[int, Worth | None], width: int = 80) -> str:
    """As a terminal of this width shows it."""
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(worth_table(forecaster(worths).calibrations))
    return console.file.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    forecaster(WORTHS).save_pretrained(tmp_path / "f")
    return tmp_path / "f"


def invoke(*args: object) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, args)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_table_is_printed_and_the_plot_drawn(folder, tmp_path):
    text = invoke(folder, "--picture", tmp_path / "drawn")
    (line,) = [line for line in text.splitlines() if line.startswith(" 10 of 50")]
    assert line.split()[-5:] == ["4.77x", "53.6", "47.4", "33.9", "24"]
    assert Image.open(tmp_path / "drawn" / "worth.png").width > 500


def test_json_holds_what_is_stored(folder):
    first, _ = json.loads(invoke("--json", folder))["calibrated"]
    assert Worth(**first["worth"]) == WORTHS[13]
    assert first["speedup"] == pytest.approx(50 / (13 + 0.012 * 37))


def test_the_steps_of_every_list_are_in_a_table_of_80_columns():
    worth = replace(WORTHS[13], lpips_mean=0.0123, lpips_max=0.2, validated=False)
    text = table({13: worth, 10: None})
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert "0.012  0.200" in text and "24 own" in text
    title, header, *lines = [line for line in text.splitlines() if line.strip()]
    column = slice(header.index("at steps"), header.index("faster") - 1)
    listed = [int(cell) for line in lines for cell in line[column].split() if cell.isdigit()]
    assert listed[:13] == [round(index * 49 / 12) for index in range(13)]


def test_what_was_not_measured_is_told(tmp_path):
    nothing = " ".join(table({10: None}).split())
    assert "5.00x" in nothing and "not measured: train anew" in nothing and "own" not in nothing
    assert "faster: where a skipped step takes no time" in nothing
    assert "LPIPS" not in nothing and "takes no time" not in table(WORTHS)
    own = table({10: replace(WORTHS[10], validated=False)})
    assert "own: prompts of the fit" in " ".join(own.split()) and "not measured" not in own
    forecaster({10: None}).save_pretrained(tmp_path)
    invoke(tmp_path, "--picture", tmp_path / "drawn")
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["table-10-of-50-cond.png"]


def test_an_untrained_forecaster_has_no_table(tmp_path):
    forecaster({}).save_pretrained(tmp_path)
    assert "speed-up" not in invoke(tmp_path)
