"""Forecasters on the Hub, against a stand-in of its HTTP interface on this machine."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
from hub_stand_in import TOKEN, serving
from huggingface_hub import ModelCard
from PIL import Image
from shaken_forecasters import PLAN, SIGMAS, random_rows, shaken

from lesa import LesaError, LesaForecaster, Schedule
from lesa.forecasters.card import card
from lesa.forecasters.guard import Guard
from lesa.forecasters.worth import Worth

METADATA = {
    "model_class": "FluxTransformer2DModel",
    "model_id": "owner/base-model",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "prompts": 16,
    "seed": 3,
    "call": {"height": 512, "guidance_scale": 3.5},
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, in the place of the Hub for this process, with a cache of its own."""
    from huggingface_hub import constants

    with serving() as answers:
        for name, value in {
            "ENDPOINT": answers.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": answers.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,  # which the Makefile sets
            "HF_HUB_DISABLE_XET": True,  # the stand-in has git-lfs' transfer only
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield answers


@pytest.fixture
def forecaster():
    made = shaken(metadata=dict(METADATA))
    made.correct(PLAN, SIGMAS, "cond", random_rows(made))
    made.calibrations[0].worth = Worth(52.4, 47.1, 40.9, 24, True, 0.0123, 0.0456, 0.02)
    made.recommend(Schedule.every(5, 50), SIGMAS)
    return made


def picture(path, size=(4, 4)):
    Image.new("RGB", size, "red").save(path)
    return path


def test_what_is_pushed_is_what_is_read_back(hub, forecaster, tmp_path):
    at = forecaster.push_to_hub(
        "me/flux-lesa", license="mit", private=True, pictures=[picture(tmp_path / "a fox.png")]
    )
    sha = hub.branches["me/flux-lesa"]["main"]
    assert at == f"{hub.url}/me/flux-lesa/commit/{sha}" and hub.private["me/flux-lesa"]
    files = hub.commits["me/flux-lesa"][sha]
    assert set(files) == {
        "README.md",
        "config.json",
        "model.safetensors",
        "pictures/a-fox.png",
    }
    assert "PUT a large file" in hub.asked and len(hub.commits["me/flux-lesa"]) == 2  # one commit
    back = LesaForecaster.from_pretrained("me/flux-lesa")
    assert back.metadata == METADATA and back.calibrated == forecaster.calibrated
    assert torch.equal(
        back.table(PLAN, SIGMAS).coefficients, forecaster.table(PLAN, SIGMAS).coefficients
    )
    assert back.calibrations[0].worth == forecaster.calibrations[0].worth


def test_revisions(hub, forecaster):
    forecaster.push_to_hub("me/lesa")
    first = hub.branches["me/lesa"]["main"]
    other = LesaForecaster("table", metadata={"seed": 9})
    other.recommend(Schedule.every(4, 20), [1 - s / 20 for s in range(21)])
    other.push_to_hub("me/lesa", revision="v2", message="Another one")
    other.push_to_hub("me/lesa", revision="v2")  # a branch that is there is written to
    assert LesaForecaster.from_pretrained("me/lesa").metadata == METADATA
    assert LesaForecaster.from_pretrained("me/lesa", revision="v2").metadata == {"seed": 9}
    assert LesaForecaster.from_pretrained("me/lesa", revision=first).metadata == METADATA
    with pytest.raises(LesaError, match="cannot be loaded from the Hub at revision 'v3'"):
        LesaForecaster.from_pretrained("me/lesa", revision="v3")


def test_what_was_downloaded_is_read_without_the_hub(hub, forecaster, monkeypatch):
    forecaster.push_to_hub("me/lesa")
    LesaForecaster.from_pretrained("me/lesa")
    asked = len(hub.asked)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert LesaForecaster.from_pretrained("me/lesa").metadata == METADATA
    assert len(hub.asked) == asked


def test_refusals_are_one_sentence(hub, forecaster, monkeypatch):
    with pytest.raises(LesaError, match=r"^repo_id='me/lesa': the Hub refused .*401.*; log in"):
        forecaster.push_to_hub("me/lesa", token="hf_wrong")
    assert not hub.commits
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LesaError, match="^repo_id='me/lesa': the Hub cannot be reached") as caught:
        forecaster.push_to_hub("me/lesa")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given, told",
    [
        ({"repo_id": "flux-lesa"}, "^repo_id='flux-lesa': not the id of a Hub repository"),
        ({"repo_id": "me/a--b"}, "^repo_id='me/a--b': not the id"),
        ({"repo_id": 3}, "^repo_id=3: not the id"),
        ({"license": "MIT license"}, "^license='MIT license': not an identifier of the Hub"),
        ({"base_model": "/home/me/flux"}, "^base_model='/home/me/flux': not the id of a Hub"),
        ({"pictures": ["none.png"]}, "none.png cannot be read"),
        ({"pictures": [__file__]}, "not a picture; give a PNG"),
        ({"pictures": "a.png"}, r"^pictures='a.png': not a list of files; give \['a.png'\]"),
    ],
    ids=str,
)
def test_wrong_arguments_send_nothing(hub, forecaster, given, told):
    with pytest.raises(LesaError, match=told):
        forecaster.push_to_hub(given.pop("repo_id", "me/lesa"), **given)
    assert not hub.asked


def test_pictures_of_one_name(forecaster, tmp_path):
    (tmp_path / "b").mkdir()
    paths = [picture(tmp_path / "x y.png"), picture(tmp_path / "b" / "x-y.png")]
    with pytest.raises(LesaError, match="another one has this name"):
        forecaster.push_to_hub("me/lesa", pictures=paths)


def test_the_card_tells_what_training_recorded(forecaster):
    text = card(forecaster, "me/lesa", license="mit", pictures=["pictures/a-fox.png"])
    head = ModelCard(text).data
    assert (head.base_model, head.license, head.library_name) == (
        "owner/base-model",
        "mit",
        "lesa",
    )
    assert {"lesa", "diffusers"} <= set(head.tags)
    table = re.findall(r"(?m)^\| (.+) \|$", text)
    rows = [[cell.strip() for cell in row.split("|")] for row in table]
    assert rows[2] == [
        *("10 of 50", "4.63x", "52.4", "47.1", "40.9", "0.012", "0.046", "24"),
    ]
    assert rows[3] == ["13 of 50", "3.85x", *["-"] * 6]
    assert "![a fox](pictures/a-fox.png)" in text
    assert "- call: height=512, guidance_scale=3.5" in text
    assert "No licence was named" not in text
    code = re.search(r"(?s)```python\n(.+?)```", text)[1]
    compile(code, "card", "exec")
    assert 'lesa.enable(pipe, "me/lesa", full_steps=13)' in code


def test_a_card_of_what_was_not_recorded():
    """A folder's name is no base model, and what a file says cannot break the page."""
    evil = "x](http://e) <script> | # y\n# z"
    text = card(LesaForecaster("table", metadata={"model_id": evil, "seed": None}), "me/lesa")
    head = ModelCard(text).data
    assert head.base_model is None and head.license == "other"
    assert "No licence was named" in text and "What it is worth" not in text
    body = text.split("---\n", 2)[2]
    assert "<script>" not in body.replace("\\<", "") and "\n# z" not in body
    own = LesaForecaster("table")
    entry = own.recommend(Schedule.every(5, 50), SIGMAS)
    entry.worth = Worth(50.0, 45.0, 40.0, 4, False)
    assert "| 4 own |" in card(own, "me/lesa") and "*own*: prompts" in card(own, "me/lesa")


def test_the_card_tells_of_a_guard():
    """What it adds counts in the speed-up, and its steps are listed."""
    made = LesaForecaster("table")
    entry = made.recommend(Schedule.every(5, 50), SIGMAS)
    full = entry.schedule.full_steps
    more = Schedule.explicit([*full, 48, 49], 50)
    entry.guard = Guard(full[1], 0.25, more, share=0.5)
    text = card(made, "me/lesa")
    assert f"| {50 / (len(full) + 1):.2f}x |" in text
    listed = ", ".join(map(str, more.full_steps))
    assert "by more than 0.25 " in text and f"as 50% did: {listed}\n" in text


def test_the_card_is_what_the_hub_takes(forecaster, tmp_path):
    """Through huggingface_hub's own reader of cards, whatever a picture is called."""
    data = io.StringIO(card(forecaster, "me/lesa", base_model="owner/other"))
    loaded = ModelCard(data.getvalue())
    assert loaded.data.base_model == "owner/other"
    assert json.dumps(loaded.data.to_dict())
