"""Parts that several pipelines, threads or models share, and pipelines of two transformers."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from model_checks import executions
from tiny_pipelines import build, run, wan_22
from user_checks import at_step, check_nothing_stale, fresh, new_fallbacks

import lesa
from lesa import LesaError, Schedule, Taylor
from lesa.hooks.attach import attached
from lesa.hooks.generation import SHARED

THIRD = Schedule.fora(3)  # of six steps 0 and 3 are full


def sibling(pipe, scheduler=None):
    """Another pipeline with the same parts and a scheduler of its own."""
    scheduler = scheduler or copy.deepcopy(pipe.scheduler)
    other = type(pipe)(**{**pipe.components, "scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    return other


def in_threads(*jobs):
    """Run functions at the same time; what each returned or raised."""
    results = [None] * len(jobs)

    def work(number):
        try:
            results[number] = jobs[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_two_pipelines_share_one_transformer(name):
    """Only one of them was given to `enable`: the steps are those of whoever calls."""
    pipe, call = build(name)
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    other = sibling(pipe)
    first, longer = run(pipe, call()), call(num_inference_steps=9)
    expected = run(fresh(pipe), longer)
    assert torch.equal(run(other, call(num_inference_steps=9)), expected)
    assert torch.equal(run(pipe, call()), first)
    found = lesa.stats(pipe)
    assert found.skipped == 2 * found.full and found.fallbacks == {}


def test_a_second_pipeline_runs_inside_a_callback_of_the_first():
    pipe, call = build("flux")
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    preview = sibling(pipe)
    alone = run(pipe, call())

    def look(*_):
        run(preview, call(num_inference_steps=3))

    inside = new_fallbacks(pipe, call(callback_on_step_end=at_step(1, look)))
    assert inside  # the state of a thread belongs to one loop: these steps are full
    assert torch.equal(check_nothing_stale(pipe, call), alone)


@pytest.mark.parametrize("both", [False, True], ids=["one enabled", "both enabled"])
def test_two_threads_two_pipelines_one_transformer(both):
    pipe, call = build("flux")
    lesa.enable(pipe, Taylor(1), schedule=THIRD, tap="hidden")
    other = sibling(pipe)
    if both:
        lesa.enable(other, Taylor(1), schedule=THIRD, tap="hidden")
    options = {"num_inference_steps": 9}
    alone = run(pipe, call()), run(other, call(**options))
    found = in_threads(lambda: run(pipe, call()), lambda: run(other, call(**options)))
    assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))
    assert lesa.stats(pipe).fallbacks == {}


def test_one_pipeline_in_two_threads_is_detected(caplog):
    """diffusers itself mixes the two runs up: the scheduler is one object."""
    pipe, call = build("flux")
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    alone = run(pipe, call())
    meeting = threading.Barrier(2, timeout=60)
    both = at_step(1, lambda *_: meeting.wait() and None)
    steps = {"num_inference_steps": 12, "callback_on_step_end": both}
    in_threads(*[lambda: run(pipe, call(**steps))] * 2)
    (reason,) = [why for why in lesa.stats(pipe).fallbacks if "two threads" in why]
    assert "from_pipe" in reason and reason in caplog.text
    assert torch.equal(check_nothing_stale(pipe, call), alone)


def test_the_pipeline_that_is_advised_for_a_thread_keeps_the_weights_as_they_are():
    """diffusers' from_pipe turns shared weights into float32 if it is not told a dtype."""
    pipe, _ = build("flux")
    pipe.to(dtype=torch.bfloat16)
    advice = SHARED[SHARED.index("type(pipe)") :]
    other = eval(advice, {"pipe": pipe, "copy": copy})
    assert other.transformer is pipe.transformer and other.scheduler is not pipe.scheduler
    assert pipe.dtype == torch.bfloat16


def test_one_pipeline_in_one_thread_after_another_is_fine():
    pipe, call = build("flux")
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    alone = run(pipe, call())
    for _ in range(2):
        assert torch.equal(in_threads(lambda: run(pipe, call()))[0], alone)
    assert lesa.stats(pipe).fallbacks == {}


def test_the_remedy_for_two_threads_works():
    pipe, call = build("flux")
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    second = type(pipe).from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler))
    second.set_progress_bar_config(disable=True)
    alone = run(pipe, call())
    found = in_threads(lambda: run(pipe, call()), lambda: run(second, call()))
    assert all(torch.equal(image, alone) for image in found)
    assert lesa.stats(pipe).fallbacks == {}


@torch.no_grad()
def own_loop(model, call, scheduler, end=None):
    """A loop of one's own over the times that the scheduler has already."""
    scheduler.set_begin_index(0)
    scheduler._step_index = None
    latent = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(7))
    for time in scheduler.timesteps[:end]:
        noise = model(
            hidden_states=latent,
            timestep=time.expand(1) / 1000,
            guidance=torch.ones(1),
            encoder_hidden_states=call["prompt_embeds"],
            pooled_projections=call["pooled_prompt_embeds"],
            img_ids=torch.zeros(64, 3),
            txt_ids=torch.zeros(6, 3),
            return_dict=False,
        )[0]
        latent = scheduler.step(noise, time, latent, return_dict=False)[0]
    return latent


@pytest.mark.parametrize("end", [None, 3], ids=["finished", "broken off"])
def test_a_loop_of_ones_own_in_one_thread_per_request(end):
    """All requests use the times that were set once; the threads of some live on."""
    pipe, call = build("flux")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    config = lesa.LesaConfig(Taylor(1), schedule=THIRD, scheduler=scheduler)
    lesa.apply_lesa_cache(pipe.transformer, config)
    alone = own_loop(pipe.transformer, call(), scheduler)
    for _ in range(2):
        in_threads(lambda: own_loop(pipe.transformer, call(), scheduler, end))
        (found,) = in_threads(lambda: own_loop(pipe.transformer, call(), scheduler))
        assert torch.equal(found, alone)
    assert lesa.stats(pipe).fallbacks == {}
    with ThreadPoolExecutor(2) as pool:  # whose threads do not end
        meeting = threading.Barrier(2, timeout=60)
        for _ in range(2):  # both threads have had a finished run when one begins another
            runs = pool.submit(lambda: own_loop(pipe.transformer, call(), scheduler))
            assert torch.equal(runs.result(), alone)
            for each in [pool.submit(meeting.wait) for _ in range(2)]:
                each.result()
    assert lesa.stats(pipe).fallbacks == {}


def test_the_transformer_is_replaced():
    pipe, call = build("flux")
    expected = run(pipe, call())
    old = pipe.transformer
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    accelerated = run(pipe, call())
    pipe.transformer = build("flux")[0].transformer
    assert torch.equal(run(pipe, call()), expected)  # the new one is not accelerated
    with pytest.raises(LesaError, match="not accelerated; call lesa.enable"):
        lesa.stats(pipe)
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    assert torch.equal(run(pipe, call()), accelerated)
    lesa.disable(pipe)
    assert torch.equal(run(pipe, call()), expected)
    pipe.transformer = old  # still accelerated
    assert torch.equal(run(pipe, call()), accelerated)
    lesa.disable(pipe)
    assert torch.equal(run(pipe, call()), expected)


def test_a_deepcopy_is_plain_and_can_be_enabled():
    pipe, call = build("sdxl")
    expected = run(pipe, call())
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    accelerated = run(pipe, call())
    clone = copy.deepcopy(pipe)
    clone.set_progress_bar_config(disable=True)
    assert torch.equal(run(clone, call()), expected)
    lesa.enable(clone, Taylor(1), schedule=THIRD)
    lesa.disable(pipe)
    assert torch.equal(run(clone, call()), accelerated)
    assert torch.equal(run(pipe, call()), expected)


CACHES = {
    "first block": lambda: diffusers.FirstBlockCacheConfig(threshold=0.1),
    "MagCache": lambda: diffusers.MagCacheConfig(num_inference_steps=6, mag_ratios=torch.ones(6)),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_of_diffusers_is_refused_in_both_orders(name):
    pipe, call = build("flux")
    expected = run(pipe, call())
    config = CACHES[name]()
    pipe.transformer.enable_cache(config)
    with pytest.raises(LesaError, match="call model.disable_cache"):
        lesa.enable(pipe)
    pipe.transformer.disable_cache()
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    first = run(pipe, call())
    with pytest.raises(ValueError, match="already been enabled"):
        pipe.transformer.enable_cache(config)
    assert torch.equal(run(pipe, call()), first)
    lesa.disable(pipe)
    assert torch.equal(run(pipe, call()), expected)


def test_a_cache_put_past_enable_cache_is_refused_before_the_first_step():
    pipe, call = build("flux")
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    first = run(pipe, call())
    diffusers.hooks.apply_first_block_cache(
        pipe.transformer, diffusers.FirstBlockCacheConfig(threshold=0.1)
    )
    with pytest.raises(LesaError, match="cache hook .* remove it first"):
        run(pipe, call())
    for block in (
        *pipe.transformer.transformer_blocks,
        *pipe.transformer.single_transformer_blocks,
    ):
        for hook in list(block._diffusers_hook.hooks):
            block._diffusers_hook.remove_hook(hook)
    assert torch.equal(run(pipe, call()), first)


def test_both_transformers_of_wan_22_are_accelerated():
    pipe, call = wan_22()
    steps = {"num_inference_steps": 10}
    expected = run(pipe, call(**steps))
    lesa.enable(pipe, Taylor(1), schedule=Schedule.every(1))
    assert torch.equal(run(pipe, call(**steps)), expected)
    lesa.enable(pipe, Taylor(1), schedule=THIRD)  # 0, 3, 6, 9
    early = int((pipe.scheduler.timesteps >= 500).sum())
    assert 1 < early < 9 and early % 3  # the second begins with a forecast from the first
    blocks = [executions(model) for model in (pipe.transformer, pipe.transformer_2)]
    first = run(pipe, call(**steps))
    own = [step < early for step in (0, 3, 6, 9)]
    full = [own.count(True), own.count(False)]
    assert [max(counts.values()) for counts in blocks] == [2 * n for n in full]  # two branches
    found = lesa.stats(pipe)
    assert (found.generations, found.num_steps, found.full, found.skipped) == (1, 10, 8, 12)
    assert found == lesa.stats(pipe.transformer) == lesa.stats(pipe.transformer_2)
    assert found.fallbacks == {}
    assert torch.equal(run(pipe, call(**steps)), first)
    lesa.disable(pipe)
    assert not attached(pipe.transformer) and not attached(pipe.transformer_2)
    assert torch.equal(run(pipe, call(**steps)), expected)


def test_a_wan_22_run_that_broke_off_in_either_half():
    pipe, call = wan_22()
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    first = run(pipe, call())

    def stop(*_):
        raise KeyboardInterrupt

    for step in (0, 4):
        with pytest.raises(KeyboardInterrupt):
            run(pipe, call(callback_on_step_end=at_step(step, stop)))
        assert torch.equal(run(pipe, call()), first)


def test_wan_22_with_one_transformer_only():
    pipe, call = wan_22()
    pipe = diffusers.WanPipeline(**{**pipe.components, "transformer": None}, boundary_ratio=1.0)
    pipe.set_progress_bar_config(disable=True)
    expected = run(pipe, call())
    with lesa.accelerate(pipe, Taylor(1), schedule=THIRD):
        run(pipe, call())
        assert lesa.stats(pipe).skipped == 8
    assert torch.equal(run(pipe, call()), expected)


def test_a_refusal_of_the_second_transformer_leaves_the_first_alone():
    pipe, call = wan_22()
    expected = run(pipe, call())
    pipe.transformer_2.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(LesaError, match="FirstBlockCacheConfig"):
        lesa.enable(pipe, Taylor(1), schedule=THIRD)
    assert not attached(pipe.transformer)
    pipe.transformer_2.disable_cache()
    assert torch.equal(run(pipe, call()), expected)


def modular_flux(transformer=None):
    """The denoising of a modular pipeline: it sets no context and tells nobody when it ends."""
    classic, call = build("flux")
    classic.transformer = transformer or classic.transformer
    blocks = diffusers.modular_pipelines.FluxAutoBlocks().sub_blocks["denoise"]
    pipe = blocks.init_pipeline()
    pipe.update_components(transformer=classic.transformer, scheduler=classic.scheduler)
    names = ("prompt_embeds", "pooled_prompt_embeds", "num_inference_steps", "height", "width")

    def image(**more):
        arguments = call(**more)
        given = {name: arguments[name] for name in (*names, "generator")}
        return pipe(**given, output="latents")

    return pipe, image


def test_a_modular_pipeline():
    pipe, image = modular_flux()
    expected = image()
    lesa.enable(pipe, Taylor(1), schedule=Schedule.every(1))
    assert torch.equal(image(), expected)
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    first = image()
    image(batch=2)
    image(num_inference_steps=9)
    assert torch.equal(image(), first)
    found = lesa.stats(pipe)
    assert found.skipped == 2 * found.full and found.fallbacks == {}
    lesa.disable(pipe)
    assert torch.equal(image(), expected)


def test_a_modular_pipeline_that_broke_off(monkeypatch):
    pipe, image = modular_flux()
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    first = image()
    step, calls = pipe.scheduler.step, []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pipe.scheduler, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            image()
    assert torch.equal(image(), first)
    assert lesa.stats(pipe).fallbacks == {}


def test_another_modular_pipeline_after_one_that_broke_off(monkeypatch):
    """The second was never enabled, and has a scheduler of its own."""
    pipe, image = modular_flux()
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    first = image()
    other, other_image = modular_flux(pipe.transformer)
    assert other.scheduler is not pipe.scheduler
    step, calls = pipe.scheduler.step, []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pipe.scheduler, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            image()
    assert torch.equal(other_image(), first)
    assert torch.equal(image(), first)
    assert lesa.stats(pipe).fallbacks == {}
