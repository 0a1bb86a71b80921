"""Caches of diffusers and of cache-dit: they skip what they say, count it, and leave nothing."""

from __future__ import annotations

from functools import cache, partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from tiny_pipelines import build, run

from lesa import accelerate
from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.evaluation import Bench
from lesa.evaluation import build as method
from lesa.evaluation.methods import unfit
from lesa.evaluation.peers import diffusers_caches
from lesa.evaluation.peers.cache_dit import dbcache, mask_steps
from lesa.evaluation.peers.diffusers_caches import _taylor_steps, cached, magnitude_ratios
from lesa.evaluation.peers.metering import blocks_of
from lesa.forecasters.taylor import Taylor

STEPS = 6
PIPELINES = ("flux", "qwen", "hunyuan-video")
THRESHOLDS = ("fbcache", "magcache")
packaged = pytest.mark.skipif(find_spec("cache_dit") is None, reason="needs cache-dit")


@cache
def bench(name):
    """A tiny pipeline with its prompt as embeddings, and its plain result."""
    pipe, call = build(name)
    settings = call()
    del settings["generator"]
    return Bench(STEPS, pipe, settings, ["a title"]), call, run(pipe, call())


def attributes(model):
    """Everything that hangs on the instances of a model, and the order of its parts."""
    return [(name, sorted(vars(part)), list(part._modules)) for name, part in model.named_modules()]


def with_cache(name, applied):
    """The result under a cache, its `Use`; asserts that the pipeline is as before afterwards."""
    tools, call, plain = bench(name)
    pipe, kind = tools.pipe, type(tools.pipe)
    before, own = attributes(pipe.transformer), dict(vars(kind))
    with applied(pipe) as use:
        result = run(pipe, call())
    assert attributes(pipe.transformer) == before
    assert dict(vars(kind)) == own
    assert torch.equal(run(pipe, call()), plain)
    return result, use


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("peer", [*THRESHOLDS, "dbcache", "dbcache-taylor"])
def test_a_threshold_is_found_counted_and_undone(name, peer):
    tools, _, plain = bench(name)
    if (reason := unfit(peer, tools)) is not None:
        pytest.skip(reason)
    found = method(peer, 3, tools)
    assert (found.full_steps, found.one_by_one) == (3, True)
    result, use = with_cache(name, found.applied)
    assert 3 <= use.full_steps() < STEPS
    assert use.cache_bytes() > 0
    assert not torch.equal(result, plain)


@pytest.mark.parametrize("name", PIPELINES)
def test_no_skipped_step_is_the_plain_run(name):
    _, _, plain = bench(name)
    config = partial(diffusers_caches._make, "FirstBlockCacheConfig", threshold=-1.0)
    result, use = with_cache(name, partial(cached, configure=config, num_steps=STEPS))
    assert torch.equal(result, plain)
    assert use.full_steps() == STEPS


@pytest.mark.parametrize("name", PIPELINES)
def test_taylorseer_of_diffusers_is_the_table(name):
    """In lite mode it forecasts the model's output by the formula of lesa's own table."""
    tools, call, plain = bench(name)
    found = method("taylorseer-diffusers", 4, tools)
    assert found.schedule.full_steps == (0, 1, 2, 4)
    theirs, use = with_cache(name, found.applied)
    assert use.full_steps() == 4
    with accelerate(tools.pipe, Taylor(order=1), schedule=found.schedule):
        ours = run(tools.pipe, call())
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert not torch.equal(theirs, plain)


def test_taylorseer_lists():
    assert _taylor_steps(5, 20) == [0, 1, 2, 4, 9, 14, 19]
    assert _taylor_steps(1, 6) == list(range(6))


def test_magnitude_ratios_are_those_of_the_residual():
    """|r_s| / |r_{s-1}| in the mean over tokens, r = what all blocks together add."""
    tools, call, _ = bench("flux")
    model, residuals = tools.pipe.transformer, {}

    def entered(_, args, kwargs):
        residuals["in"] = kwargs["hidden_states"]

    def left(_, args, output):
        norms.append((output[1] - residuals["in"]).norm(dim=-1))

    norms = []
    blocks = blocks_of(model)
    handles = [
        blocks[0].register_forward_pre_hook(entered, with_kwargs=True),
        blocks[-1].register_forward_hook(left),
    ]
    run(tools.pipe, call(generator=torch.Generator().manual_seed(0)))
    for handle in handles:
        handle.remove()
    branches = norms[0::2], norms[1::2]  # two guidance calls per step
    for step in range(1, STEPS):
        expected = sum(float((b[step] / b[step - 1]).mean()) for b in branches) / 2
        assert magnitude_ratios(tools)[step] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("peer", ["pab", "fastercache"])
def test_reused_attention_is_metered_in_operations(peer):
    tools, call, _ = bench("flux")
    single = Bench(STEPS, tools.pipe, {**tools.settings, "true_cfg_scale": 1.0}, ["a title"])
    found = method(peer, 1, single)
    assert "reused in runs of 9" in found.note
    assert diffusers_caches.calls_in_a_step(single) == 1
    plain = diffusers_caches._flops(single, STEPS)
    with found.applied(tools.pipe):
        share = diffusers_caches._flops(single, STEPS) / plain
    assert f"{share:.0%} of" in found.note
    assert 0.3 < share < 1
    assert "both guidance calls" in unfit(peer, tools)  # here two calls share one state


def test_seacache_runs_where_the_pipeline_tells_noise_levels():
    tools, _, plain = bench("wan")
    found = method("seacache", 3, tools)
    result, use = with_cache("wan", found.applied)
    assert 3 <= use.full_steps() < STEPS
    assert not torch.equal(result, plain)
    assert "passes noise levels" in unfit("seacache", bench("flux")[0])


def test_what_cannot_run_says_why():
    unet, bare = bench("sdxl")[0], bench("flux")[0]
    bare = Bench(STEPS, bare.pipe, bare.settings)
    for peer in ("fbcache", "pab", "taylorseer-diffusers", "magcache", "seacache"):
        assert "enable_cache, StableDiffusionXLPipeline has none" in unfit(peer, unet)
    for peer in ("fbcache", "taylorseer-diffusers"):
        assert "enters cache_context, Flux2Pipeline does" in unfit(peer, bench("flux2")[0])
    for peer in ("fbcache", "pab", "fastercache", "magcache"):
        assert "give --calibration FILE" in unfit(peer, bare)
    blocks = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    model = torch.nn.Module()
    model.blocks, model.enable_cache = blocks, None
    strange = Bench(STEPS, SimpleNamespace(transformer=model), {}, ["a title"])
    assert "not Linear" in unfit("fbcache", strange)
    assert "proj_out" in unfit("taylorseer-diffusers", strange)


def test_masks_have_the_wanted_number_of_steps():
    assert mask_steps(8, 28) == [0, 1, 2, 3, 6, 12, 19, 27]
    for steps in (4, 28, 50, 100):
        for wanted in range(1, steps + 1):
            mask = mask_steps(wanted, steps)
            assert len(set(mask)) == wanted
            assert (mask[0], max(mask)) == (0, steps - 1 if wanted > 1 else 0)


@packaged
def test_the_mask_ultra_is_the_packages():
    import cache_dit

    theirs = cache_dit.steps_mask(mask_policy="ultra", total_steps=28)
    assert mask_steps(8, 28) == [step for step, full in enumerate(theirs) if full]


@packaged
@pytest.mark.parametrize("name", PIPELINES)
def test_a_mask_runs_the_listed_steps(name):
    tools, _, plain = bench(name)
    found = method("dbcache-scm", 3, tools, searched=Schedule.explicit((0, 1, 4)))
    assert found.schedule_text == "searched: 0,1,4"
    result, use = with_cache(name, found.applied)
    assert use.full_steps() == 3
    assert use.cache_bytes() > 0
    assert not torch.equal(result, plain)
    everything = partial(dbcache, num_steps=STEPS, mask=[1] * STEPS, two_calls=True)
    assert torch.equal(with_cache(name, everything)[0], plain)


@packaged
def test_a_last_block_without_text_has_no_series_of_it():
    """That of Stable Diffusion 3 returns the picture alone."""
    tools, _, plain = bench("sd3")
    found = method("dbcache-scm-taylor", 3, tools, searched=Schedule.explicit((0, 1, 4)))
    result, use = with_cache("sd3", found.applied)
    reuse = method("dbcache-scm", 3, tools, searched=Schedule.explicit((0, 1, 4)))
    reused, _ = with_cache("sd3", reuse.applied)
    assert use.full_steps() == 3
    assert not torch.equal(result, plain) and not torch.equal(result, reused)


@packaged
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("order", [0, 1])
def test_dbcache_begins_every_generation_anew(name, order):
    """The second generation under one cache is what it is alone, whatever the first one was."""
    tools, call, _ = bench(name)
    mask = [1, 1, 0, 0, 1, 0]
    with_mask = partial(dbcache, num_steps=STEPS, order=order, mask=mask, two_calls=True)
    alone, _ = with_cache(name, with_mask)
    other = call(generator=torch.Generator().manual_seed(8))
    with with_mask(tools.pipe) as use:
        first, second = run(tools.pipe, other), run(tools.pipe, call())
    assert use.full_steps() == 3
    assert torch.equal(second, alone) and not torch.equal(first, alone)


@packaged
def test_dbcache_needs_an_adapter():
    assert "StableDiffusionXLPipeline" in unfit("dbcache", bench("sdxl")[0])


def test_dbcache_names_the_missing_package(monkeypatch):
    monkeypatch.setattr("lesa.evaluation.peers.cache_dit.find_spec", lambda name: None)
    with pytest.raises(LesaError, match="needs the package cache-dit; run pip install"):
        method("dbcache", 3, bench("flux")[0])
