"""A short soak; benchmarks/soak.py has the long form."""

from __future__ import annotations

import pytest
import torch
from soak_requests import Request, own_loop
from soak_run import slope, soak
from tiny_pipelines import build, run

import lesa


def test_every_picture_of_a_soak_is_as_if_alone():
    found = soak(50, seed=364, distinct=20)
    assert found.differ == []
    assert found.requests == 50 and found.ended["picture"] > 25
    assert found.calls["skipped"] > found.calls["full"] / 2
    assert {"raise", "interrupt", "nested", "prompt", "close"} < set(found.events)
    assert {"enable", "disable", "accelerate", "none", "refused"} == set(found.changes)
    first, *_, last = found.samples
    assert last[2] <= first[2] + 200  # live tensors: a run that stays leaves hundreds


@pytest.mark.parametrize("guidance", [0.0, 5.0])
def test_a_loop_of_ones_own_has_no_guidance_from_the_pipelines_last_call(guidance):
    """Its flags stay after a call, and tell how many parts the rows of a call are."""
    pipe, make = build("sdxl")
    left_out = ("num_inference_steps", "generator", "output_type")
    call = {name: value for name, value in make(2).items() if name not in left_out}
    quick = {"form": "table", "refine": 0, "polish": 0, "progress": False}
    forecaster = lesa.train(pipe, None, 8, 4, call=call, **quick)
    assert forecaster.calibrations[0].split  # rows of their own for either part
    request = Request("sdxl", None, "own", 8, 16, 2, 5.0, 0, 0, loop=True)
    pipe = build("sdxl")[0]
    with lesa.accelerate(pipe, forecaster):
        *_, alone = own_loop(pipe, request)
        run(pipe, make(2, guidance_scale=guidance))
        *_, after = own_loop(pipe, request)
        assert lesa.stats(pipe).skipped and lesa.stats(pipe).fallbacks == {}
    assert torch.equal(alone, after)


def test_a_slope_is_told_with_its_noise():
    told = slope([(x, 2 * x + 5) for x in range(0, 100, 10)])
    assert told["per_100_requests"] == pytest.approx(200)
    assert told["standard_error"] == pytest.approx(0, abs=1e-6)
    scattered = slope([(x, (x // 10) % 2) for x in range(0, 100, 10)])
    assert abs(scattered["per_100_requests"]) < 3 * scattered["standard_error"]
