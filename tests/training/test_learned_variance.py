"""Models that return a variance behind their sample: nothing is fitted to what the loop drops."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from training_jobs import STEPS, decibels, make

import lesa
from lesa.hooks.outputs import WithVariance, has_variance, make_output
from lesa.training.job import Job, sample_of


def cut(pipe):
    """The same pipeline with a model that returns its sample alone."""
    whole = pipe.transformer
    config = {**whole.config, "out_channels": whole.config.in_channels}
    config.pop("_use_default_values", None)  # it would bring the default number back
    state = dict(whole.state_dict())
    patch, channels = whole.config.patch_size**2, whole.config.out_channels
    for name in ("proj_out.weight", "proj_out.bias"):
        kept = state[name].view(patch, channels, -1)[:, : config["out_channels"]]
        state[name] = kept.flatten(0, 1).reshape(-1, *state[name].shape[1:])
    pipe.transformer = type(whole).from_config(config).eval()
    pipe.transformer.load_state_dict(state)
    return pipe


def trained(pipe, call, tap):
    return lesa.train(pipe, None, STEPS, 3, tap=tap, call=call, form="table", progress=False)


@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_a_variance_changes_nothing(tap):
    """Neither the coefficients nor the pictures, though the model returns twice the channels."""
    (pipe, call), (alone, _) = make("pixart"), make("pixart")
    alone.transformer.load_state_dict(pipe.transformer.state_dict())
    forecasters = [trained(pipe, call, tap), trained(cut(alone), call, tap)]
    assert forecasters[0].uses_latent is (tap == "output")
    rows = [each.calibrations[0].rows["default"] for each in forecasters]
    torch.testing.assert_close(*rows, rtol=1e-3, atol=1e-4)
    pictures = []
    for each, own in zip(forecasters, (pipe, alone), strict=True):
        with lesa.accelerate(own, each, full_steps=3):
            pictures.append(Job(own, ["a", "b"], call).run(range(2), STEPS))
            assert lesa.stats(own).skipped and not lesa.stats(own).fallbacks
    assert decibels(*pictures).min() > 40


def test_what_is_a_variance():
    sample = torch.zeros(2, 8, 6, 6)
    assert has_variance(sample, torch.zeros(2, 4, 6, 6))
    for other in (None, torch.zeros(2, 8, 6, 6), torch.zeros(2, 4, 3, 6), torch.zeros(1, 4, 6, 6)):
        assert not has_variance(sample, other)
    assert not has_variance(torch.zeros(2, 8, 3), torch.zeros(2, 4, 3))  # tokens, not channels
    (whole,) = make_output(WithVariance(tuple), torch.ones(2, 4, 6, 6))
    assert whole.shape == sample.shape and whole[:, :4].all() and not whole[:, 4:].any()


@pytest.mark.parametrize(("kind", "channels"), [("fixed_small", 4), ("learned_range", 8)])
def test_a_sampler_that_uses_the_variance_gets_it(kind, channels):
    pipe = SimpleNamespace(scheduler=DDPMScheduler(variance_type=kind))
    denoiser = SimpleNamespace(clock=SimpleNamespace(pipes=[pipe]))
    found = sample_of(denoiser, (torch.zeros(1, 8, 6, 6),), torch.zeros(1, 4, 6, 6))
    assert found.shape == (1, channels, 6, 6)
