"""A user says what shall be reached instead of how many steps are full."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import lesa
from lesa import LesaConfig, LesaError, LesaForecaster, Schedule
from lesa.errors import RunError
from lesa.forecasters.worth import Worth

LISTS = {4: [0, 2, 5, 9], 3: [0, 3, 7], 2: [0, 4]}
P10 = {4: 50.0, 3: 42.0, 2: 31.0}


@pytest.fixture
def run(tiny_flux, inputs) -> Any:
    """Runs the pipeline with these options of `enable`, and gives the stats."""

    def call(forecaster: Any, inference: dict[str, Any] | None = None, **options: Any) -> Any:
        with lesa.accelerate(tiny_flux, forecaster, **options):
            tiny_flux(**{**inputs(), **(inference or {})})
            return lesa.stats(tiny_flux)

    return call


@pytest.fixture
def trained(tiny_flux, inputs) -> LesaForecaster:
    """For 4, 3 and 2 of 12 steps, with hand-made measurements of them."""
    tiny_flux(**inputs())
    levels = tiny_flux.scheduler.sigmas.tolist()
    made = LesaForecaster()
    for count, full in LISTS.items():
        schedule = Schedule.explicit(full, 12)
        made.correct(schedule, levels, "cond", made.table(schedule, levels).coefficients)
        worth = Worth(P10[count] + 5, P10[count], P10[count] - 9, 24, True, share=0.02)
        made.recommend(schedule, levels).worth = worth
    return made


@pytest.mark.parametrize(
    ("options", "count", "why"),
    [
        ({"target_speedup": 2.5}, 4, "target_speedup=2.5 of 4, 3 and 2 calibrated, predicted 2.88"),
        ({"target_speedup": 3}, 3, "predicted 3.77"),
        ({"target_speedup": np.float64(5)}, 2, "predicted 5.45"),
        ({"target_psnr": 45}, 4, "p10 50.0 dB on 24 pictures, unseen ones among them"),
        ({"target_psnr": 42}, 3, "p10 42.0 dB"),
        ({"quality": "best"}, 4, "quality='best' of 4, 3 and 2 calibrated"),
        ({"quality": "balanced"}, 3, "quality='balanced'"),
        ({"quality": "fast"}, 2, "quality='fast'"),
    ],
)
def test_the_list_of_the_chosen_count_runs(run, trained, options, count, why):
    found = run(trained, **options)
    assert found.full_steps == tuple(LISTS[count])
    assert (found.full, found.skipped, found.fallbacks) == (count, 12 - count, {})
    assert why in found.chosen and found.chosen in str(found)
    assert found.to_dict()["chosen"] == found.chosen


def test_nothing_is_said_where_nothing_was_chosen(run, trained):
    found = run(trained, full_steps=3)
    assert not found.chosen and "chosen" not in str(found)


def test_a_saved_forecaster_chooses_the_same(run, trained, tmp_path):
    trained.save_pretrained(tmp_path)
    assert run(str(tmp_path), target_psnr=42).full_steps == tuple(LISTS[3])


def test_another_number_of_steps_keeps_the_speed_up_or_the_count(run, trained):
    twice = {"num_inference_steps": 24}
    with pytest.warns(UserWarning, match="num_inference_steps=24"):
        assert run(trained, twice, target_speedup=2.5).full == 8
    with pytest.warns(UserWarning, match="num_inference_steps=24"):
        assert run(trained, twice, quality="best").full == 4


def test_a_psnr_that_was_not_measured_stops_the_run_at_its_first_step(tiny_flux, inputs, trained):
    lesa.enable(tiny_flux, trained, target_psnr=40)
    with pytest.raises(RunError, match="target_psnr=40: nothing was measured in runs of 24 steps"):
        tiny_flux(**{**inputs(), "num_inference_steps": 24})
    assert lesa.stats(tiny_flux).full == 0
    tiny_flux(**inputs())
    assert lesa.stats(tiny_flux).full == 3


def test_formulas_have_a_speed_up(run):
    """By S / |A|; their authors' rules may have no list of the wanted count, only of fewer."""
    assert run("taylor-1", target_speedup=3).full <= 4
    for wanted in (1, 1.9, 2.3, 3.1, 5.9):
        for method in ("taylor-1", "fora", "hicache", "foca", "spectrum", LesaForecaster(), None):
            options = {} if method is None else {"forecaster": method}
            schedule = LesaConfig(target_speedup=wanted, **options).bound_schedule(50)
            assert 50 / len(schedule.full_steps) >= wanted
    with pytest.raises(LesaError, match="target_speedup=60: taylor-1 makes 50 steps at most 16.7"):
        LesaConfig("taylor-1", target_speedup=60).bound_schedule(50)


def test_the_range_of_formulas_is_told(tiny_flux, inputs):
    lesa.enable(tiny_flux, "spectrum", target_speedup=11)
    with pytest.raises(RunError, match="target_speedup=11: spectrum makes 12 steps at most 2"):
        tiny_flux(**inputs())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"target_speedup": 9}, "target_speedup=9: .* 2.8 to 5.4 times faster; ask for at most"),
        ({"target_psnr": 51}, "target_psnr=51: .* 31.0 to 50.0 dB .*; ask for at most 50.0"),
        ({"target_psnr": 40, "quality": "fast"}, "target_psnr=40 and quality='fast' exclude each"),
        ({"target_speedup": 3, "full_steps": 3}, "full_steps=3 and target_speedup=3 exclude"),
        ({"quality": "fast", "schedule": Schedule.every(5)}, "schedule=every.5. and quality="),
        ({"target_speedup": 0}, "target_speedup=0: slower"),
        ({"quality": "worst"}, "quality='worst': not one of"),
        ({"target_psnr": np.ones(2)}, "target_psnr=.*not a finite number"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_changes(tiny_flux, trained, options, told):
    with pytest.raises(LesaError, match=told):
        lesa.enable(tiny_flux, trained, **options)
    assert not tiny_flux.transformer.is_cache_enabled


@pytest.mark.parametrize("forecaster", [None, "taylor-1", LesaForecaster()])
def test_what_was_not_trained_has_no_decibels_and_no_counts(tiny_flux, forecaster):
    refused = ({"target_psnr": 30}, "no decibels"), ({"quality": "fast"}, "no counts")
    for options, told in refused[:1] if forecaster is None else refused:  # the prior has counts
        with pytest.raises(
            LesaError, match=f"not trained on this model and has {told}.*lesa.train"
        ):
            lesa.enable(tiny_flux, forecaster, **options)


def test_a_psnr_of_the_fits_own_prompts_is_doubted(tiny_flux, trained):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lesa.enable(tiny_flux, trained, target_psnr=40)
    for entry in trained.calibrations:
        entry.worth = Worth(50, 45, 30, 4, False)
    with pytest.warns(UserWarning, match="target_psnr=40: .*prompts of the fit itself"):
        lesa.enable(tiny_flux, trained, target_psnr=40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lesa.enable(tiny_flux, trained, quality="fast")


def test_a_custom_loop_has_targets_too(tiny_flux, trained):
    options = {
        "target_psnr": 40,
        "num_inference_steps": 12,
        "sigmas": trained.calibrations[0].sigmas,
    }
    config = LesaConfig(trained, **options)
    lesa.apply_lesa_cache(tiny_flux.transformer, config)
    assert config.bound_schedule(12, config.sigmas).full_steps == tuple(LISTS[3])
    with pytest.raises(LesaError, match="nothing was measured in runs of 6 steps"):
        LesaConfig(trained, target_psnr=40, num_inference_steps=6)
