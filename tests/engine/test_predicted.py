"""Skipped steps that run a network: on what, how often, for how long it holds features."""

from __future__ import annotations

import gc
import weakref

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from tiny_pipelines import build, run

import lesa
from lesa import LesaConfig, LesaForecaster, Schedule
from lesa.engine.predicted import BridgedRing
from lesa.errors import LesaError
from lesa.hooks.alone import blocks_of
from lesa.hooks.pipeline import find_denoiser
from lesa.hooks.two_blocks import TwoBlocks

STEPS = 6
PLAN = Schedule.explicit((0, 2, 4), STEPS)
NAMES = [
    "flux",
    "qwen",
    "sd3",
    "wan",
]  # double and single blocks; two branches; batched; one stream


def levels_of(pipe, call):
    seen = []
    lesa.enable(pipe, lesa.Reuse(), schedule=Schedule.explicit((0, 1, 2, 3, 4, 5), STEPS))
    from lesa.hooks.attach import attached

    denoiser = attached(find_denoiser(pipe))
    tick = denoiser.clock.tick
    denoiser.clock.tick = lambda *given: seen.append(tick(*given)) or seen[-1]
    run(pipe, call())
    lesa.disable(pipe)
    return seen[0].sigmas, tuple(dict.fromkeys(step.branch for step in seen))


def untrained(pipe, call, gain=1.0, reuse=0.0):
    """A forecaster around copies of the model's own blocks."""
    sigmas, branches = levels_of(pipe, call)
    forecaster = LesaForecaster("disca", branches=branches, uses_latent=False)
    rows = torch.zeros(STEPS, 3, dtype=torch.float64)
    rows[list(PLAN.skipped_steps), 0] = reuse
    for branch in branches:
        forecaster.correct(PLAN, sigmas, branch, rows)
    gains = {branch: torch.full((STEPS,), gain) for branch in branches}
    forecaster.net.learn(TwoBlocks(find_denoiser(pipe)).state_dict(), gains)
    return forecaster


@pytest.mark.parametrize("name", ["qwen", "sd3", "wan"])
def test_two_blocks_of_a_model_of_two_give_the_plain_run(name):
    """Nothing lies between them, so that the network is the model."""
    pipe, call = build(name)
    plain = run(pipe, call())
    with lesa.accelerate(pipe, untrained(pipe, call)):
        found = run(pipe, call())
        stats = lesa.stats(pipe)
    assert stats.skipped == stats.full and not stats.fallbacks
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_without_a_gain_it_is_the_table():
    pipe, call = build("flux")
    with lesa.accelerate(pipe, lesa.Reuse(), schedule=PLAN, tap="output"):
        reused = run(pipe, call())
    with lesa.accelerate(pipe, untrained(pipe, call, gain=0.0, reuse=1.0)):
        assert torch.equal(run(pipe, call()), reused)


@pytest.mark.parametrize("name", NAMES)
def test_the_models_own_blocks_run_at_full_steps_only(name):
    pipe, call = build(name)
    forecaster, ran = untrained(pipe, call), []
    for block in blocks_of(find_denoiser(pipe)):
        block.register_forward_hook(lambda block, *_: ran.append(block))
    run(pipe, call())
    plain = len(ran)
    with lesa.accelerate(pipe, forecaster):
        first = run(pipe, call())
        ran.clear()
        assert torch.equal(run(pipe, call()), first)
    assert len(ran) == plain / 2
    ran.clear()
    run(pipe, call())
    assert len(ran) == plain  # nothing is left


def test_the_bridges_are_counted_and_gone_after_the_last_skipped_step(monkeypatch):
    pipe, call = build("flux")
    forecaster, bridges, push = untrained(pipe, call), [], BridgedRing.push

    def watched(self, feature):
        push(self, feature)
        bridges.extend(weakref.ref(part) for part in self.bridge.values())

    monkeypatch.setattr(BridgedRing, "push", watched)
    gc.collect()
    gc.disable()
    try:
        with lesa.accelerate(pipe, forecaster):
            run(pipe, call())
            held = lesa.stats(pipe).ring_bytes
    finally:
        gc.enable()
    assert len(bridges) == 2 * 2 * 3  # streams, branches, full steps
    assert not any(bridge() is not None for bridge in bridges)
    with lesa.accelerate(pipe, lesa.Taylor(1), schedule=PLAN, tap="output"):
        run(pipe, call())
        assert held > lesa.stats(pipe).ring_bytes


def test_a_full_step_that_nothing_needs_is_not_noted(monkeypatch):
    pipe, call = build("flux")
    forecaster, made = untrained(pipe, call), []
    bridge = TwoBlocks.bridge
    monkeypatch.setattr(
        TwoBlocks, "bridge", lambda self, *args: made.append(1) or bridge(self, *args)
    )
    sigmas, branches = levels_of(pipe, call)
    ends = Schedule.explicit((0, 2, 5), STEPS)
    for name in branches:
        forecaster.correct(ends, sigmas, name, torch.zeros(STEPS, 3, dtype=torch.float64))
    with lesa.accelerate(pipe, forecaster, schedule=ends):
        run(pipe, call())
    assert len(made) == 2 * len(branches)


def test_another_run_than_the_trained_one_is_computed_in_full_and_told():
    pipe, call = build("flux")
    plain = run(pipe, call(num_inference_steps=5))
    with lesa.accelerate(pipe, untrained(pipe, call)):
        assert torch.equal(run(pipe, call(num_inference_steps=5)), plain)
        stats = lesa.stats(pipe)
    assert not stats.skipped
    (told,) = stats.fallbacks  # the same sentence at every step
    assert "tied to the list and the noise levels" in told


def test_weights_of_other_blocks_are_told_before_anything_changes():
    pipe, call = build("qwen")
    forecaster = untrained(pipe, call)
    plain = run(pipe, call())
    with lesa.accelerate(pipe, forecaster):
        weights = forecaster.net.weights.pop("join.weight")
        assert torch.equal(run(pipe, call()), plain)  # it became another one since: in full
        assert any("are not those that" in reason for reason in lesa.stats(pipe).fallbacks)
    with pytest.raises(LesaError, match="are not those that .*; unload adapters and quantisers"):
        lesa.enable(pipe, forecaster)
    forecaster.net.weights["join.weight"] = weights
    model = find_denoiser(pipe)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(LesaError, match="unload adapters"):
        lesa.enable(pipe, forecaster)
    with pytest.raises(LesaError, match="not accelerated"):
        lesa.stats(pipe)


def test_what_cannot_be_is_told_before_anything_changes():
    pipe, call = build("flux")
    forecaster = untrained(pipe, call)
    with pytest.raises(
        LesaError, match=r"full_steps=2: form='disca' is tied to .*\(3 full steps\)"
    ):
        lesa.enable(pipe, forecaster, full_steps=2)
    with pytest.raises(LesaError, match="form='disca': it is tied to the list"):
        lesa.enable(pipe, forecaster, schedule=Schedule.explicit((0, 3)))
    with pytest.raises(LesaError, match="is not trained; train it with lesa.train"):
        lesa.enable(pipe, LesaForecaster("disca"))
    with pytest.raises(LesaError, match="cannot run alone"):
        unet = find_denoiser(build("sdxl")[0])
        config = LesaConfig(forecaster)
        forecaster.metadata.clear()
        lesa.apply_lesa_cache(unet, config)
    with pytest.raises(LesaError, match="not accelerated"):
        lesa.stats(pipe)
    lesa.enable(pipe, forecaster, full_steps=3)
    lesa.enable(pipe, forecaster, schedule=PLAN)
    lesa.disable(pipe)


@pytest.mark.parametrize("way", ["model", "sequential", "group"])
def test_offloaded_models_give_the_same(way):
    pipe, call = build("flux")
    forecaster = untrained(pipe, call)
    with lesa.accelerate(pipe, forecaster):
        expected = run(pipe, call())
    cpu = torch.device("cpu")
    put = {
        "model": lambda part: accelerate.cpu_offload_with_hook(part, cpu),
        "sequential": lambda part: accelerate.cpu_offload(part, cpu, offload_buffers=True),
        "group": lambda part: apply_group_offloading(part, cpu, cpu, offload_type="leaf_level"),
    }
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            put[way](part)
    with lesa.accelerate(pipe, forecaster):
        assert torch.equal(run(pipe, call()), expected)
        assert not lesa.stats(pipe).fallbacks
    if way == "sequential":
        with pytest.raises(LesaError, match="are offloaded part by part; train with"):
            TwoBlocks(find_denoiser(pipe))


def test_compiled_blocks_give_the_same():
    """The two of the network run uncompiled, and show no other block's work."""
    pipe, call = build("flux")
    forecaster = untrained(pipe, call)
    with lesa.accelerate(pipe, forecaster):
        expected = run(pipe, call())
    for block in blocks_of(find_denoiser(pipe)):
        block.compile(backend="eager")
    with lesa.accelerate(pipe, forecaster):
        torch.testing.assert_close(run(pipe, call()), expected)
        torch.testing.assert_close(run(pipe, call()), expected)
        assert not lesa.stats(pipe).fallbacks
