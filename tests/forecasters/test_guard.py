"""What a forecaster keeps of a guard, and what is refused as one."""

from __future__ import annotations

import json

import pytest
import torch
from shaken_forecasters import PLAN, SIGMAS, random_rows, shaken

from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.forecasters import LesaForecaster
from lesa.forecasters.guard import Guard, relative_change
from lesa.forecasters.target import Target

STEPS, BRANCHES = PLAN.steps, ("cond", "uncond")
FULL = PLAN.full_steps
ROUTED = Schedule.explicit([*FULL[:-1], FULL[-1] + 1], STEPS)
SPENT = Schedule.explicit([*FULL, FULL[-1] + 1], STEPS)


def guarded(kind):
    forecaster = shaken(branches=BRANCHES)
    for branch in BRANCHES:
        forecaster.correct(PLAN, SIGMAS, branch, random_rows(forecaster))
    rows, split = {}, {}
    if kind == "route":
        rows = {branch: 0 * random_rows(forecaster) for branch in BRANCHES}
        for found in rows.values():
            found[list(ROUTED.skipped_steps), 0] = 0.75
        split = {"cond": torch.stack([rows["cond"], 2 * rows["cond"]], -1)}
    schedule = ROUTED if kind == "route" else SPENT
    forecaster.calibrations[0].guard = Guard(FULL[1], 0.25, schedule, rows, split, 0.5)
    return forecaster


@pytest.mark.parametrize("kind", ["route", "spend"])
def test_a_folder_keeps_it(tmp_path, kind):
    forecaster = guarded(kind)
    forecaster.save_pretrained(tmp_path)
    back = LesaForecaster.from_pretrained(tmp_path)
    was, found = forecaster.calibrations[0].guard, back.calibrations[0].guard
    assert found is not None and found.kind == kind
    assert found.to_dict() == was.to_dict()
    for branch in BRANCHES:
        table, again = (f.table(was.schedule, SIGMAS, branch) for f in (forecaster, back))
        assert torch.equal(table.coefficients, again.coefficients)
        if kind == "route":
            assert torch.equal(table.coefficients, was.rows[branch])
            assert table.parts == (2 if branch == "cond" else 1)


def test_the_list_that_a_guard_changes_to_is_a_trained_one():
    assert guarded("route").mismatch(ROUTED, SIGMAS) is None
    assert guarded("spend").mismatch(SPENT, SIGMAS).kind == "list"


def test_rows_that_are_set_anew_have_no_guard():
    forecaster = guarded("route")
    forecaster.correct(PLAN, SIGMAS, "cond", random_rows(forecaster))
    assert forecaster.calibrations[0].guard is None


def test_what_it_spends_counts_in_the_speed_up():
    forecaster = guarded("spend")
    entry = forecaster.calibrations[0]
    assert entry.mean_full_steps == len(FULL) + 0.5
    times = STEPS / (len(FULL) + 0.5)
    choose = Target(speedup=times - 0.01).choose
    assert choose(forecaster.calibrations, STEPS, SIGMAS).full_steps == len(FULL)
    with pytest.raises(LesaError, match="ask for at most"):
        Target(speedup=times + 0.01).choose(forecaster.calibrations, STEPS, SIGMAS)


LATE, OTHER = FULL[1], Schedule.explicit([0, *[s + 1 for s in FULL[1:]]], STEPS)


@pytest.mark.parametrize(
    ("guard", "sentence"),
    [
        (Guard(LATE, 0.1, Schedule.explicit([0, 1], 7)), "it is of 7 steps, and guards"),
        (Guard(0, 0.1, SPENT), "step 0 is no later full step"),
        (Guard(LATE, 0.1, OTHER), f"up to step {LATE} it differs"),
        (Guard(LATE, 0.1, PLAN), "it adds no full steps"),
        (Guard(LATE, 0.1, ROUTED), "it adds no full steps"),
        (Guard(LATE, 0.1, SPENT, dict.fromkeys(BRANCHES, torch.ones(1))), "full steps, and guards"),
        (Guard(LATE, 0.1, ROUTED, {"cond": torch.ones(1)}), "rows for .'cond'., not for"),
    ],
)
def test_what_cannot_guard_a_list(guard, sentence):
    with pytest.raises(LesaError, match=sentence):
        guard.check(PLAN, BRANCHES)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", 0),
        ("step", "2"),
        ("limit", -1.0),
        ("limit", float("inf")),
        ("share", 2.0),
        ("schedule", None),
        ("schedule", {"rule": "explicit", "value": [1], "num_steps": STEPS}),
        ("branches", ["cond"]),
        ("branches", 3),
    ],
)
def test_a_file_that_was_changed(tmp_path, field, value):
    guarded("route").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["calibrated"][0]["guard"][field] = value
    path.write_text(json.dumps(config))
    with pytest.raises(LesaError):
        LesaForecaster.from_pretrained(tmp_path)


def test_a_route_with_impossible_coefficients_is_refused(tmp_path):
    forecaster = guarded("route")
    rows = forecaster.calibrations[0].guard.rows["uncond"]
    rows *= 1e6
    forecaster.save_pretrained(tmp_path)
    with pytest.raises(LesaError, match="coefficients of magnitude"):
        LesaForecaster.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_change_is_relative_and_of_every_row(dtype):
    draw = torch.Generator().manual_seed(0)
    now, before = torch.randn(2, 5, 3, 4, 4, generator=draw).to(dtype)
    expected = (now.double() - before.double()).flatten(1).norm(dim=1)
    expected /= now.double().flatten(1).norm(dim=1)
    found = relative_change(now, before)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)  # of bfloat16
    if dtype == torch.float32:
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
