"""Whose run is this? Runs that break off, nest, interleave or come from pipelines never enabled."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import threading

import diffusers
import pytest
import torch
from tiny_pipelines import build, run
from user_checks import at_step, fresh, new_fallbacks

import lesa
from lesa import LesaConfig, Schedule, Taylor

THIRD = Schedule.fora(3)  # of six steps 0 and 3 are full
OUTSIDE = "called from outside of the pipeline's loop"


class Stop(Exception):
    """What a user's stop button raises."""


def stop(*_):
    raise Stop


def sibling(pipe, cls=None, **parts):
    """A pipeline on the same model that lesa was never told of, with a scheduler of its own."""
    parts = {"scheduler": copy.deepcopy(pipe.scheduler), **parts}
    other = (cls or type(pipe))(**{**pipe.components, **parts})
    other.set_progress_bar_config(disable=True)
    return other


class Renamed(diffusers.FluxPipeline):
    """A user's own class, whose loop is the inherited one."""


class Wrapped(diffusers.FluxPipeline):
    """A user's own class, whose call goes on to the inherited one."""

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class Otherwise(diffusers.FluxPipeline):
    """A user's own class with a loop in a method of another name."""

    @torch.no_grad()
    def paint(self, prompt_embeds, pooled_prompt_embeds, callback=None, steps=6, **_):
        self.scheduler.set_timesteps(steps)
        latent = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(7))
        for index, time in enumerate(self.scheduler.timesteps):
            noise = self._predict(latent, time, prompt_embeds, pooled_prompt_embeds)
            latent = self.scheduler.step(noise, time, latent, return_dict=False)[0]
            if callback is not None:
                callback(self, index, time, {"latents": latent})
        return latent

    def _predict(self, latent, time, prompt, pooled):
        ids = torch.zeros(64, 3), torch.zeros(6, 3)
        return self.transformer(
            hidden_states=latent, timestep=time.expand(1) / 1000, guidance=torch.ones(1),
            encoder_hidden_states=prompt, pooled_projections=pooled, img_ids=ids[0], txt_ids=ids[1],
            return_dict=False,
        )[0]  # fmt: skip


OTHERS = {
    "the same class": lambda pipe: sibling(pipe),
    "a subclass": lambda pipe: sibling(pipe, Renamed),
    "a subclass with its own call": lambda pipe: sibling(pipe, Wrapped),
    "from_pipe, the scheduler shared": lambda pipe: quiet(type(pipe).from_pipe(pipe)),
    "another sampler": lambda pipe: sibling(
        pipe,
        scheduler=diffusers.UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
    ),
}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def enabled():
    pipe, call = build("flux")
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    return pipe, call


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("step", [0, 4])
def test_another_pipeline_after_a_run_that_broke_off(enabled, name, step):
    """Every argument is the same object, so that nothing but the stack tells the two apart."""
    pipe, call = enabled
    other, arguments = OTHERS[name](pipe), call()
    expected = run(fresh(other), arguments | {"generator": call()["generator"]})
    with pytest.raises(Stop):
        run(pipe, arguments | {"callback_on_step_end": at_step(step, stop)})
    found = run(other, arguments | {"generator": call()["generator"]})
    assert torch.equal(found, expected)
    assert lesa.stats(pipe).fallbacks == {}


def test_a_pipeline_whose_loop_is_a_method_of_another_name():
    pipe, call = build("flux")
    first, second = sibling(pipe, Otherwise), sibling(pipe, Otherwise)
    lesa.enable(first, Taylor(1), schedule=THIRD)
    arguments = call()
    expected = first.paint(**arguments)
    found = lesa.stats(first)
    assert (found.full, found.skipped, found.fallbacks) == (2, 4, {})
    with pytest.raises(Stop):
        first.paint(**arguments, callback=at_step(3, stop))
    assert torch.equal(second.paint(**arguments), expected)
    assert lesa.stats(first).fallbacks == {}


@pytest.mark.parametrize("broken", [False, True], ids=["to its end", "broken off"])
@pytest.mark.parametrize("name", OTHERS)
def test_another_pipeline_inside_a_callback(enabled, name, broken):
    """The inner run is as if alone; the outer one has one full step more for it."""
    pipe, call = enabled
    inner, arguments, found = OTHERS[name](pipe), call(), []
    if inner.scheduler is pipe.scheduler:
        pytest.skip("diffusers itself mixes up two runs of one scheduler")
    end = {"callback_on_step_end": at_step(2, stop)} if broken else {}
    expected = [run(fresh(inner), arguments | {"generator": call()["generator"]})]

    def look(*_):
        try:
            found.append(run(inner, arguments | {"generator": call()["generator"]} | end))
        except Stop:
            found.append(None)

    again = {"callback_on_step_end": at_step(0, look)}
    reasons = new_fallbacks(pipe, arguments | {"generator": call()["generator"]} | again)
    assert reasons == {"no history at a later step": 2}  # of each branch
    if not broken:
        assert torch.equal(found[0], expected[0])


def test_a_nested_run_that_broke_off_leaves_the_outer_one_nothing(enabled):
    pipe, call = enabled
    inner, pictures = sibling(pipe), []
    for end in ({}, {"callback_on_step_end": at_step(2, stop)}):

        def look(*_, end=end):
            with contextlib.suppress(Stop):
                run(inner, call(**end))

        pictures.append(run(pipe, call(callback_on_step_end=at_step(1, look))))
    assert torch.equal(*pictures)


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DDIMScheduler"])
def test_a_counted_run_goes_on_at_its_step_after_a_nested_one(scheduler):
    pipe, call = build("sdxl")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    inner = sibling(pipe)
    look = at_step(1, lambda *_: run(inner, call()) is None)
    before = lesa.stats(pipe)
    reasons = new_fallbacks(pipe, call(callback_on_step_end=look))
    assert reasons == {"no history at a later step": 1}
    after = lesa.stats(pipe)  # full: 0, 2, 3 of the outer run and 0, 3 of the inner one
    assert (after.full - before.full, after.skipped - before.skipped) == (5, 7)


@pytest.mark.parametrize("name", ["flux", "sdxl"])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_call_of_the_model_in_a_callback_is_no_part_of_the_loop(name, step):
    """It is computed in full, and the loop goes on as if nothing had happened."""
    pipe, call = build(name)
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    model, calls, found = lesa.api.find_denoiser(pipe), [], []
    alone = run(pipe, call())
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    run(pipe, call())
    hook.remove()

    def look(*_):
        args, kwargs = calls[0]
        found.append(model(*args, **kwargs)[0])
        expected.append(original(*args, **kwargs)[0])

    original, expected = copy.deepcopy(model), []
    reasons = new_fallbacks(pipe, call(callback_on_step_end=at_step(step, look)))
    assert reasons == {OUTSIDE: 1}
    assert torch.equal(found[0], expected[0])
    assert torch.equal(run(pipe, call(callback_on_step_end=at_step(step, look))), alone)


def test_a_bare_call_between_two_runs():
    pipe, call = build("flux")
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    model, calls = pipe.transformer, []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    arguments = call()
    with pytest.raises(Stop):
        run(pipe, arguments | {"callback_on_step_end": at_step(1, stop)})
    hook.remove()
    with torch.no_grad():
        found = model(**calls[0])[0]
        assert torch.equal(found, copy.deepcopy(model)(**calls[0])[0])
    expected = run(fresh(pipe), call())
    assert torch.equal(run(pipe, call()), expected)


@torch.no_grad()
def ddim_loop(model, call, scheduler, seed, end=None):
    """A loop of one's own over times that were set before, with arguments by place."""
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    added = {"text_embeds": call["pooled_prompt_embeds"], "time_ids": torch.ones(1, 6)}
    for time in scheduler.timesteps[:end]:
        noise = model(latent, time, call["prompt_embeds"], added_cond_kwargs=added)[0]
        latent = scheduler.step(noise, time, latent).prev_sample
    return latent


def test_a_counted_loop_of_ones_own_that_broke_off():
    """DDIM has no step index, and nothing but the time tells that the loop begins anew."""
    pipe, call = build("sdxl")
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(6)
    config = LesaConfig(Taylor(1), schedule=THIRD, scheduler=scheduler)
    lesa.apply_lesa_cache(pipe.unet, config)
    arguments = call()
    expected = ddim_loop(pipe.unet, arguments, scheduler, 2)
    for end in (1, 2, 4, None):
        ddim_loop(pipe.unet, arguments, scheduler, 1, end)
        assert torch.equal(ddim_loop(pipe.unet, arguments, scheduler, 2), expected)
    assert lesa.stats(pipe).fallbacks == {}


def partial_of(pipe):
    return functools.partial(pipe.__call__, return_dict=False)


def compiled(pipe):
    torch._dynamo.reset()
    return torch.compile(pipe.__call__, backend="eager")


def in_a_class(pipe):
    class Service:
        """Holds a pipeline and passes on what it is asked for."""

        def __getattr__(self, name):
            return getattr(pipe, name)

        def __call__(self, **arguments):
            return pipe(**arguments)

    return Service()


@pytest.mark.parametrize("wrap", [partial_of, compiled, in_a_class])
def test_a_pipeline_behind_a_wrapper(enabled, wrap):
    pipe, call = enabled
    alone = run(pipe, call())
    outer = wrap(pipe)
    before = lesa.stats(pipe)
    found = outer(**call())[0]
    after = lesa.stats(pipe)
    assert torch.equal(found, alone) and after.fallbacks == {}
    assert (after.full, after.skipped) == (2 * before.full, 2 * before.skipped)


def own_loop(pipe, seed, prompts, steps=6):
    """A loop of one's own that hands out its latent after every step."""
    latent = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(seed))
    for index in range(steps):
        with torch.no_grad():
            noise = pipe._predict(latent, torch.tensor(1000 - 160.0 * index), *prompts)
        latent = latent - noise / 6
        yield latent


def test_generators_that_take_turns():
    """Two loops of one's own share a model, a prompt and all arguments but the latent."""
    pipe, call = build("flux")
    arguments = call()
    prompts = arguments["prompt_embeds"], arguments["pooled_prompt_embeds"]
    pipe = sibling(pipe, Otherwise)
    plain = [list(own_loop(pipe, seed, prompts)) for seed in (1, 2)]
    config = LesaConfig(Taylor(1), schedule=THIRD, num_inference_steps=6)
    lesa.apply_lesa_cache(pipe.transformer, config)
    for seed in (1, 2):
        list(own_loop(pipe, seed, prompts))
    assert lesa.stats(pipe).skipped == 8
    turns = zip(own_loop(pipe, 1, prompts), own_loop(pipe, 2, prompts), strict=True)
    *_, last = turns
    assert all(torch.equal(one, many[-1]) for one, many in zip(last, plain, strict=True))
    found = lesa.stats(pipe)
    assert found.skipped == 8 and found.fallbacks == {"no history at a later step": 10}


def test_a_loop_of_ones_own_may_call_a_pipelines_method_at_each_step():
    pipe, call = build("flux")
    arguments = call()
    prompts = arguments["prompt_embeds"], arguments["pooled_prompt_embeds"]
    first, second = sibling(pipe, Otherwise), sibling(pipe, Otherwise)
    lesa.enable(first, Taylor(1), schedule=THIRD)

    @torch.no_grad()
    def loop(pipe, end=6):
        pipe.scheduler.set_timesteps(6)
        latent = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(7))
        for time in pipe.scheduler.timesteps[:end]:
            noise = pipe._predict(latent, time, *prompts)
            latent = pipe.scheduler.step(noise, time, latent, return_dict=False)[0]
        return latent

    expected = loop(first)
    assert lesa.stats(first).skipped == 4
    loop(first, end=4)
    assert torch.equal(loop(second), expected)
    assert lesa.stats(first).fallbacks == {}


class Guided:
    """What k-diffusion's samplers are given: one step in a call."""

    def __init__(self, model, scheduler, prompts):
        self.model, self.scheduler, self.prompts = model, scheduler, prompts

    def __call__(self, latent, time):
        return Otherwise._predict(self, latent, time, *self.prompts)

    @property
    def transformer(self):
        return self.model


@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "DDIMScheduler"])
def test_an_object_that_makes_one_step_in_a_call(scheduler):
    pipe, call = build("flux")
    arguments = call()
    prompts = arguments["prompt_embeds"], arguments["pooled_prompt_embeds"]
    kind = getattr(diffusers, scheduler)
    first, second = (Guided(pipe.transformer, kind(), prompts) for _ in range(2))
    lesa.enable(pipe, Taylor(1), schedule=THIRD)

    @torch.no_grad()
    def loop(guided, end=6):
        guided.scheduler.set_timesteps(6)
        latent = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(7))
        for time in guided.scheduler.timesteps[:end]:
            noise = guided(latent, time)
            latent = guided.scheduler.step(noise, time, latent, return_dict=False)[0]
        return latent

    expected = loop(first)
    assert lesa.stats(pipe).skipped == 4
    loop(first, end=4)
    assert torch.equal(loop(second), expected)
    assert torch.equal(loop(first), expected)
    assert lesa.stats(pipe).fallbacks == {}


def test_runs_of_one_pipeline_in_threads_that_follow_each_other(enabled):
    """A run that broke off in a thread that lives on."""
    pipe, call = enabled
    alone, other = run(pipe, call()), sibling(pipe)
    ready, done, found = threading.Event(), threading.Event(), []

    def first():
        try:
            run(pipe, call(callback_on_step_end=at_step(1, stop)))
        except Stop:
            ready.set()
        done.wait(60)
        found.append(run(other, call()))

    thread = threading.Thread(target=first)
    thread.start()
    assert ready.wait(60)
    found.append(run(pipe, call()))
    done.set()
    thread.join()
    assert all(torch.equal(picture, alone) for picture in found)
    assert lesa.stats(pipe).fallbacks == {}


def test_a_run_leaves_nothing_of_lesas_behind(enabled):
    from lesa.hooks.caller import Run

    pipe, call = enabled
    run(pipe, call())
    with pytest.raises(Stop):
        run(pipe, call(callback_on_step_end=at_step(1, stop)))
    gc.collect()
    runs = [each for each in gc.get_objects() if isinstance(each, Run) and each.pipe is not None]
    assert not [each for each in runs if each.pipe() is pipe]
