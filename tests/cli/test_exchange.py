"""`lesa convert`, `lesa export` and `lesa push`: what they write, say and refuse."""

from __future__ import annotations

import json

import pytest
import torch
from hub_stand_in import TOKEN, serving
from typer.testing import CliRunner

from lesa import LesaForecaster, Schedule
from lesa.cli import app
from lesa.exchange.convert import MODELS
from lesa.exchange.export import TARGETS
from lesa.forecasters.worth import Worth

LEVELS = [1 - s / 20 for s in range(21)]


@pytest.fixture
def saved(tmp_path):
    made = LesaForecaster("table", metadata={"model_id": "owner/base", "prompts": 4})
    for full in ((0, 4, 9, 14), (0, 1, 5, 9, 13, 17)):
        made.recommend(Schedule.explicit(full, 20), LEVELS).worth = Worth(50, 45, 40, 4, True)
    made.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(*words):
    """The sentence of a refusal."""
    done = run(*words)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    return line.removeprefix("lesa: ")


def test_export_writes_the_chosen_lists(saved, tmp_path):
    done = run("export", saved, "--to", "cache-dit", "--out", tmp_path / "m", "--full-steps", 4)
    assert done.exit_code == 0, done.output
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["cache-dit-4-of-20.yaml"]
    assert "written: " in done.stdout
    done = run("export", saved, "--to", "json", "--out", tmp_path / "j", "--json")
    assert done.exit_code == 0, done.output
    (path,) = json.loads(done.stdout)["files"]
    assert len(json.loads((tmp_path / "j" / "step-lists.json").read_text())["lists"]) == 2
    assert path.endswith("step-lists.json")


def test_export_refuses_in_one_sentence_and_writes_nothing(saved, tmp_path):
    out = tmp_path / "out"
    for words, told in (
        (("--to", "vllm"), "to='vllm': unknown; choose from cache-dit, sglang, json"),
        (("--to", "cache-dit", "--engine-version", "1.2"), "engine-version='1.2': masks are"),
        (("--to", "sglang", "--engine-version", "v3"), "engine-version='v3': schedules are"),
        (("--to", "json", "--full-steps", "5"), "full-steps=5: not calibrated, only 6, 4"),
        (("--to", "sglang"), "calibration=None: SGLang's schedule tells its cost"),
        (("--to", "sglang", "--request", saved / "none.json"), f"{saved / 'none.json'} cannot"),
    ):
        assert refused("export", saved, "--out", out, *words).startswith(told)
    assert not out.exists()


def test_convert_refuses_what_is_no_checkpoint(tmp_path):
    (tmp_path / "a_N7_E3.pt").write_text("no checkpoint")
    told = refused("convert", tmp_path / "a_N7_E3.pt", "--out", tmp_path / "out")
    assert "is no checkpoint of tensors and plain values" in told
    assert not (tmp_path / "out").exists()


def test_convert_says_what_it_took_the_file_for(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {}
    for stage, window in enumerate((4, 8, 8)):
        state[f"latent.{stage}.weight"] = torch.randn(1, window, generator=generator)
        state[f"latent.{stage}.bias"] = torch.zeros(1)
        for i, (inputs, outputs) in enumerate(((21, 3), (3, 3), (3, 1))):
            name = f"timestep.{stage}.layers.{i}"
            state[f"{name}.base_weight"] = torch.zeros(outputs, inputs)
            state[f"{name}.spline_weight"] = torch.zeros(outputs, inputs, 8)
            state[f"{name}.grid"] = (torch.arange(-3, 9) * 1.2 - 3).expand(inputs, -1)
    torch.save({"model": state}, tmp_path / "predictor_flux_N7_E3.pt")
    done = run("convert", tmp_path / "predictor_flux_N7_E3.pt", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "for flux-dev with 6 of 20 steps in full" in " ".join(done.stdout.split())
    back = LesaForecaster.from_pretrained(tmp_path / "out")
    assert back.calibrated[0].full_steps == (0, 1, 2, 3, 9, 16)


def test_push_uploads_the_folder_with_a_card(saved, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    with serving() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        done = run("push", saved, "me/lesa", "--license", "mit", "--revision", "v1", "--json")
        assert done.exit_code == 0, done.output
        sha = hub.branches["me/lesa"]["v1"]
        assert json.loads(done.stdout) == {
            "repo": "me/lesa",
            "commit": f"{hub.url}/me/lesa/commit/{sha}",
        }
        files = hub.commits["me/lesa"][sha]
        assert files["pictures/worth.png"].startswith(b"\x89PNG")
        assert b"base_model: owner/base" in files["README.md"]
        assert b"![worth](pictures/worth.png)" in files["README.md"]
        assert refused("push", saved, "lesa").startswith("repo_id='lesa': not the id of a Hub")


def test_the_helps_name_what_there_is():
    from lesa.cli.exchange import _ENGINES, _MODELS

    assert tuple(MODELS) == _MODELS and tuple(TARGETS) == _ENGINES
    for command in ("convert", "export", "push"):
        done = run(command, "--help")
        assert done.exit_code == 0 and "Example: lesa" in done.stdout
