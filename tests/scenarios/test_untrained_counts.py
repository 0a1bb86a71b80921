"""More full steps than were trained for give no worse pictures than the count that was."""

from __future__ import annotations

import pytest

import lesa
from lesa import testbed
from lesa.hooks.timed_run import generate


@pytest.mark.filterwarnings("ignore:full_steps=")
def test_a_step_more_is_no_worse_than_the_trained_count():
    pipe, settings = testbed.load("flux"), {**testbed.settings("flux"), "num_inference_steps": 20}
    options = {"form": "table", "polish": 0, "refine": 0, "progress": False, "call": settings}
    forecaster = lesa.train(pipe, testbed.captions(4, split="train"), 20, 5, **options)
    prompts, seeds = testbed.captions(6), range(6)
    plain = generate(pipe, prompts, seeds, settings).images
    found = []
    for count in (5, 6, 7):
        with lesa.accelerate(pipe, forecaster, full_steps=count):
            images = generate(pipe, prompts, seeds, settings).images
            assert lesa.stats(pipe).full == count
        error = (images - plain).square().flatten(1).mean(1)
        found.append(-10 * error.log10().mean())
    assert found[0] > 30
    assert found[0] <= found[1] <= found[2]
