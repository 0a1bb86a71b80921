"""The form "disca" as numbers: tied to one run, stored with its network, refused elsewhere."""

from __future__ import annotations

import pytest
import torch

from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.forecasters import LesaForecaster

STEPS = 4
SIGMAS = (1.0, 0.75, 0.5, 0.25, 0.0)
PLAN = Schedule.explicit((0, 2), STEPS)


@pytest.fixture
def forecaster():
    made = LesaForecaster("disca", branches=("cond", "uncond"))
    rows = torch.zeros(STEPS, 4, dtype=torch.float64)
    rows[[1, 3], 0], rows[[1, 3], 3], rows[3, 1] = 0.5, 0.25, 0.125
    for branch in made.branches:
        made.correct(PLAN, SIGMAS, branch, rows)
    gains = {branch: torch.full((STEPS,), 0.5) for branch in made.branches}
    made.net.learn({"join.weight": torch.randn(3, 6), "first.a.b": torch.randn(2)}, gains)
    return made


def test_it_has_a_table_for_its_own_run_alone(forecaster):
    assert forecaster.name == "lesa-disca" and forecaster.uses_latent
    table = forecaster.table(PLAN, SIGMAS, "default")
    assert table.coefficients[[1, 3]].tolist() == [[0.5, 0, 0, 0.25], [0.5, 0.125, 0, 0.25]]
    assert forecaster.schedule_for(2, STEPS) == PLAN
    others = [
        (Schedule.explicit((0, 1, 2), STEPS), SIGMAS),  # a full step more
        (PLAN, (1.0, 0.9, 0.5, 0.25, 0.0)),
        (Schedule.explicit((0, 2), 5), (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)),
    ]
    told = set()
    for schedule, sigmas in others:
        with pytest.raises(LesaError, match=r"tied to the list .*\(0, 2\).*; run those") as refusal:
            forecaster.table(schedule, sigmas)
        told.add(str(refusal.value))
        assert forecaster.mismatch(schedule, sigmas) is None  # nothing is damped
    assert len(told) == 1
    with pytest.raises(LesaError, match=r"full_steps=3: form='disca' is tied .*\(2 full steps\)"):
        forecaster.schedule_for(3, STEPS)


def test_the_network_is_stored_with_it(forecaster, tmp_path):
    forecaster.metadata["network_share"] = 0.25
    forecaster.save_pretrained(tmp_path)
    again = LesaForecaster.from_pretrained(tmp_path)
    assert again.metadata == {"network_share": 0.25}
    for kind in ("weights", "gains"):
        stored, loaded = getattr(forecaster.net, kind), getattr(again.net, kind)
        assert stored.keys() == loaded.keys()
        assert all(torch.equal(stored[name], loaded[name]) for name in stored)
    again.save_pretrained(tmp_path / "twice")
    files = [folder / "model.safetensors" for folder in (tmp_path, tmp_path / "twice")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("broken", ["weights", "gains"])
def test_a_folder_without_its_network_is_told(forecaster, tmp_path, broken):
    getattr(forecaster.net, broken).clear()
    forecaster.save_pretrained(tmp_path)
    with pytest.raises(LesaError, match="no predictor with a gain for each guidance branch; copy"):
        LesaForecaster.from_pretrained(tmp_path)


def test_a_network_that_is_not_finite_is_told(forecaster, tmp_path):
    forecaster.net.weights["join.weight"][0, 0] = torch.nan
    forecaster.save_pretrained(tmp_path)
    with pytest.raises(LesaError, match="holds values that are not finite"):
        LesaForecaster.from_pretrained(tmp_path)


def test_only_the_output_tap_goes_with_it():
    with pytest.raises(LesaError, match="tap='hidden' does not go with form='disca'.*; use tap="):
        LesaForecaster("disca", tap="hidden")
