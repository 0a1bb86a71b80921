"""lesa inside the installed cache-dit, against lesa itself at the hidden tap."""

from __future__ import annotations

import logging

import pytest
import torch

import lesa
from lesa.errors import LesaError
from lesa.evaluation import Bench
from lesa.evaluation import build as method
from lesa.forecasters import LesaForecaster
from lesa.hooks.noise_levels import noise_levels
from tests.integrations.captured import FULL, STEPS, trained
from tests.tiny_pipelines import build, run

cache_dit = pytest.importorskip("cache_dit")
integration = pytest.importorskip("lesa.integrations.cache_dit")


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def inside():
    """Puts lesa into cache-dit on a pipeline; everything is undone afterwards."""
    pipes = []

    def enable(pipe, *given, **options):
        cache_dit.enable_cache(pipe, **integration.configs(pipe, *given, **options))
        pipes.append(pipe)

    yield enable
    for pipe in pipes:
        cache_dit.disable_cache(pipe)


@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_the_pictures_are_those_of_lesa(name, inside):
    """With guidance as a call of its own, whose rows are others; twice, and at other steps."""
    pipe, call = build(name)
    plain = run(pipe, call(num_inference_steps=STEPS))
    levels = noise_levels(pipe.scheduler, 0, STEPS)
    forecaster = trained(levels, model=type(pipe.transformer).__name__, tap="hidden")
    with lesa.accelerate(pipe, forecaster, schedule=FULL, graph="off"):
        own = run(pipe, call(num_inference_steps=STEPS))
        assert lesa.stats(pipe).skipped == 2 * 5
    inside(pipe, forecaster, schedule=FULL, separate_cfg=True)
    found = [run(pipe, call(num_inference_steps=STEPS)) for _ in range(2)]
    torch.testing.assert_close(found[0], own, rtol=0, atol=2e-5)  # other order of fp32 sums
    assert torch.equal(*found)
    assert (own - plain).abs().max() > 100 * (found[0] - own).abs().max()


def test_a_budget_is_read_anew_in_every_run(inside):
    """cache-dit's own masks are for one number of steps."""
    pipe, call = build("qwen")
    inside(pipe, full_steps=3, separate_cfg=True)
    for steps in (5, 9):
        found = run(pipe, call(num_inference_steps=steps))
        (context,) = pipe.transformer._context_manager._cached_context_manager.values()
        assert steps - len(context.get_cached_steps()) == 3
        assert context.get_cached_steps() == context.get_cfg_cached_steps()
    cache_dit.disable_cache(pipe)
    with lesa.accelerate(pipe, full_steps=3, tap="hidden", graph="off"):
        torch.testing.assert_close(found, run(pipe, call(num_inference_steps=9)), rtol=0, atol=2e-5)


def test_other_calibrators_stay_as_they_are(inside):
    pipe, call = build("qwen")
    inside(pipe, full_steps=3)
    cache_dit.disable_cache(pipe)
    config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2)
    taylor = cache_dit.TaylorSeerCalibratorConfig()
    cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=taylor)
    run(pipe, call())
    (context,) = pipe.transformer._context_manager._cached_context_manager.values()
    assert "TaylorSeer" in repr(context.get_calibrators()[0])


def test_mistakes_are_one_sentence(inside, monkeypatch):
    pipe, call = build("qwen")
    with pytest.raises(LesaError, match="tap='hidden'"):
        integration.configs(pipe, LesaForecaster(form="table"))
    with pytest.raises(LesaError, match="trained for model_class='Other'"):
        other = LesaForecaster(form="table", tap="hidden", metadata={"model_class": "Other"})
        integration.configs(pipe, other)
    with pytest.raises(LesaError, match="no adapter for a Linear"):
        integration.configs(torch.nn.Linear(1, 1))
    inside(pipe, full_steps=3, separate_cfg=False)
    with pytest.raises(LesaError, match="pass separate_cfg=True"):
        run(pipe, call())
    cache_dit.disable_cache(pipe)
    inside(pipe, full_steps=30)
    with pytest.raises(LesaError, match="full_steps=30: the run has 6 steps"):
        run(pipe, call())
    monkeypatch.setattr(cache_dit, "__version__", "2.0.1")
    with pytest.raises(LesaError, match="cache_dit=2.0.1: .* pip install"):
        integration.configs(pipe)


def test_the_row_of_compare(quiet):
    """Untrained here, which `enable` at the hidden tap makes too; nothing is left behind."""
    pipe, call = build("flux")
    settings = call(num_inference_steps=STEPS)
    del settings["generator"]
    bench = Bench(STEPS, pipe, settings, ["a title"])
    found = method("lesa-cache-dit", 3, bench)
    assert found.schedule_text == "own: 3 steps; lesa-untrained at the hidden tap"
    plain = run(pipe, call(num_inference_steps=STEPS))
    with found.applied(pipe) as use:
        inside = run(pipe, call(num_inference_steps=STEPS))
        assert (use.full_steps(), use.cache_bytes() > 0) == (3, True)
    with lesa.accelerate(pipe, full_steps=3, tap="hidden", graph="off"):
        own = run(pipe, call(num_inference_steps=STEPS))
    torch.testing.assert_close(inside, own, rtol=0, atol=2e-5)
    assert torch.equal(run(pipe, call(num_inference_steps=STEPS)), plain)
    assert method("lesa-cache-dit", 3, bench, searched=FULL).schedule_text.startswith(
        "searched: 0,1"
    )
