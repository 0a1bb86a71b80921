"""Float64 where there is any, and fits in whatever mode the caller is in."""

from __future__ import annotations

import pytest
import torch

import lesa
from lesa.evaluation.peers.learned import fit_l2p
from lesa.forecasters import LesaForecaster
from lesa.testbed import captions, load, settings
from lesa.training import Job, collect
from lesa.training.fit import fit_continuous
from lesa.util.numerics import float64, gradients

MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
}
CALL = {k: v for k, v in settings("flux").items() if k != "num_inference_steps"}


@pytest.fixture(scope="module")
def pipe():
    return load("flux")


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_there_in_every_mode_and_the_mode_comes_back(mode):
    @gradients()
    def slope(at):
        weight = torch.tensor(at, requires_grad=True)
        weight.square().backward()
        return weight.grad.item()

    with MODES[mode]():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert slope(3.0) == slope(3.0) == 6.0  # a decorator serves more than one call
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


def trained(pipe, form):
    more = {"refine": 0, "polish": 0, "progress": False}
    return lesa.train(pipe, captions(1), 6, 3, form=form, call=CALL, **more)


@pytest.fixture(scope="module", params=["continuous", "paper"])
def plain(request, pipe):
    return request.param, trained(pipe, request.param)


@pytest.mark.parametrize("mode", MODES)
def test_training_does_not_depend_on_the_callers_mode(pipe, plain, mode):
    form, outside = plain
    with MODES[mode]():
        inside = trained(pipe, form)
    (schedule,) = inside.calibrated
    assert [schedule] == outside.calibrated
    sigmas = inside.calibrations[0].sigmas
    tables = [made.table(schedule, sigmas, "default").coefficients for made in (inside, outside)]
    torch.testing.assert_close(*tables, rtol=0, atol=0)
    assert all(not p.is_inference() and p.requires_grad for p in inside.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_fits_take_statistics_and_forecasters_that_were_made_in_any_mode(pipe, mode):
    def fitted():
        statistics = collect(Job(pipe, captions(1), CALL), 6)
        forecaster = LesaForecaster(branches=statistics.branches)
        loss = fit_continuous(forecaster, [statistics], iterations=5)
        return loss, fit_l2p(statistics).weights["cond"]

    with MODES[mode]():
        loss, weights = fitted()
    expected, others = fitted()
    assert loss == expected
    torch.testing.assert_close(weights, others, rtol=0, atol=0)


def test_float64_stays_where_it_is_and_leaves_a_device_that_has_none():
    assert float64(torch.zeros(2)).dtype == torch.float64
    assert float64(torch.zeros(2, device="meta")).device.type == "meta"
