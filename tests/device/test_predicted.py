"""A network on skipped steps runs where the pipeline is, and never lets the host wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lesa
from lesa.cli.inputs import load_pipeline
from lesa.evaluation.runs import generate, levels_of
from lesa.hooks.two_blocks import TwoBlocks
from lesa.testbed import prompts, settings

STEPS = 4
CALL = {**settings("schnell"), "num_inference_steps": STEPS, "output_type": "latent"}
PLAN = lesa.Schedule.explicit((0, 2), STEPS)


def latents(pipe: Any) -> torch.Tensor:
    return generate(pipe, prompts("schnell", 1), [0], CALL).images


@pytest.fixture(scope="module")
def host() -> Any:
    return load_pipeline("schnell", device="cpu")


def untrained(pipe: Any) -> lesa.LesaForecaster:
    latents(pipe)
    forecaster = lesa.LesaForecaster("disca", uses_latent=False)
    rows = torch.zeros(STEPS, 3, dtype=torch.float64)
    rows[[1, 3], 0] = 0.25
    forecaster.correct(PLAN, levels_of(pipe, STEPS), "cond", rows)
    weights = TwoBlocks(pipe.transformer).state_dict()
    forecaster.net.learn(weights, {"cond": torch.full((STEPS,), 0.75)})
    return forecaster


def test_a_network_is_run_on_the_device_without_a_wait(host, gpu):
    forecaster = untrained(host)
    with lesa.accelerate(host, forecaster):
        expected = latents(host)
    pipe = load_pipeline("schnell", device="cuda:1")
    with lesa.accelerate(pipe, forecaster):
        latents(pipe)
        with gpu.watched("lesa") as reads:
            found = latents(pipe)
        stats = lesa.stats(pipe)
    assert stats.skipped == stats.full == 4 and not stats.fallbacks and not stats.graphs
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-3)  # other sums in attention
    timing = ("evaluation/", "hooks/timed_run.py")
    places = [read.place.split(":")[0] for read in reads if not read.place.startswith(timing)]
    assert places == ["hooks/noise_levels.py", "engine/stats.py"]  # as with every forecaster
