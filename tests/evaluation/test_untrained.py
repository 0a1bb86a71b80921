"""lesa without training as a method of `lesa compare`."""

from __future__ import annotations

import lesa
from lesa import Prior
from lesa.evaluation import Bench, build
from lesa.evaluation.ranking import opponents
from lesa.forecasters.prior import prior_schedule
from lesa.testbed import load, settings


def test_it_runs_the_list_of_enable():
    """Which depends on the noise levels: even steps would give another one."""
    pipe, call = load("hunyuan"), {**settings("hunyuan"), "num_inference_steps": 12}
    method = build("lesa-untrained", 5, Bench(12, pipe, call))
    assert isinstance(method.forecaster, Prior) and method.label == "lesa-untrained @5"
    with lesa.accelerate(pipe, full_steps=5):
        pipe("a red circle", **call, output_type="latent")
        assert lesa.stats(pipe).full_steps == method.schedule.full_steps
    assert method.schedule != prior_schedule(5, 12)


def test_without_a_pipeline_it_goes_by_steps():
    assert build("lesa-untrained", 10, Bench(50)).schedule == prior_schedule(10, 50)


def test_it_is_no_opponent_of_lesa():
    row = {"method": "lesa-untrained", "label": "lesa-untrained @5", "full_steps": 5}
    assert not opponents([{**row, "schedule": "own: 0", "psnr_mean": 90.0}], 5)
