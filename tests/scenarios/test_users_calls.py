"""What users change from call to call and inside one: correct, or computed in full and counted."""

from __future__ import annotations

import warnings

import diffusers
import pytest
import torch
from tiny_pipelines import build, run
from user_checks import at_step, check_nothing_stale, fresh, new_fallbacks, plain

import lesa
from lesa import LesaError, LesaForecaster, Reuse, Schedule, Taylor

THIRD = Schedule.fora(3)  # of six steps 0 and 3 are full
BUILDS = [("flux", "hidden"), ("sdxl", "output")]


@pytest.fixture(params=BUILDS, ids="-".join)
def enabled(request):
    name, tap = request.param
    pipe, call = build(name)
    lesa.enable(pipe, Taylor(1), schedule=THIRD, tap=tap)
    return pipe, call


SECOND_CALLS = {
    "other batch": {"batch": 2},
    "other resolution": {"height": 32, "width": 16},
    "other step count": {"num_inference_steps": 8},
    "no guidance": {"true_cfg_scale": 1.0, "guidance_scale": 1.0},
    "other guidance": {"true_cfg_scale": 5.0, "guidance_scale": 2.0},
    "two images per prompt": {"num_images_per_prompt": 2},
    "as a tuple": {"return_dict": False},
}


def fitting(pipe, options):
    """Those of the options that the pipeline's call has."""
    known = type(pipe).__call__.__wrapped__.__code__.co_varnames
    return {name: value for name, value in options.items() if name in known or name == "batch"}


def test_a_second_call_may_be_another_one(enabled):
    pipe, call = enabled
    first = run(pipe, call())
    for options in SECOND_CALLS.values():
        check_nothing_stale(pipe, call, **fitting(pipe, options))
    negative = {name: value * 2 for name, value in call().items() if name.startswith("negative")}
    assert not torch.equal(check_nothing_stale(pipe, call, **negative), first)
    assert torch.equal(run(pipe, call()), first)
    assert lesa.stats(pipe).fallbacks == {}


MULTISTEP = {
    "DPM++ 2M": (diffusers.DPMSolverMultistepScheduler, {}),
    "DPM++ 2M Karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "UniPC": (diffusers.UniPCMultistepScheduler, {}),
    "Euler trailing": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "DDIM": (diffusers.DDIMScheduler, {}),
}


@pytest.mark.parametrize("name", MULTISTEP)
def test_a_scheduler_of_one_evaluation_per_step(name):
    pipe, call = build("sdxl")
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    first = run(pipe, call())
    before, (cls, options) = pipe.scheduler, MULTISTEP[name]
    pipe.scheduler = cls.from_config(before.config, **options)
    assert not torch.equal(check_nothing_stale(pipe, call), first)
    pipe.scheduler = before
    assert torch.equal(run(pipe, call()), first)
    found = lesa.stats(pipe)
    assert (found.full, found.skipped, found.fallbacks) == (6, 12, {})


@pytest.mark.parametrize(
    "name, cls",
    [
        ("sdxl", diffusers.HeunDiscreteScheduler),
        ("sdxl", diffusers.KDPM2DiscreteScheduler),
        ("sd3", diffusers.FlowMatchHeunDiscreteScheduler),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_two_evaluations_per_step_are_computed_in_full(name, cls):
    pipe, call = build(name)
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    first = run(pipe, call())
    before = pipe.scheduler
    pipe.scheduler = cls.from_config(before.config)
    assert torch.equal(run(pipe, call()), plain(pipe, call()))
    assert lesa.stats(pipe).fallbacks == {"scheduler of order 2": 11}
    pipe.scheduler = before
    assert torch.equal(run(pipe, call()), first)


# What the callback is given, where it shows, and whether the pipeline takes a new tensor back.
CHANGED = {
    "prompt_embeds": ("flux", "encoder_hidden_states changed", True),
    "pooled_prompt_embeds": ("flux", "pooled_projections changed", False),
    "negative_prompt_embeds": ("flux", "encoder_hidden_states changed", False),
    "add_text_embeds": ("sdxl", "added_cond_kwargs['text_embeds'] changed", True),
    "add_time_ids": ("sdxl", "added_cond_kwargs['time_ids'] changed", True),
}


@pytest.mark.parametrize("tensor", CHANGED)
@pytest.mark.parametrize("in_place", [False, True], ids=["new tensor", "in place"])
def test_a_callback_changes_the_prompt(tensor, in_place, monkeypatch):
    name, reason, is_taken = CHANGED[tensor]
    pipe, call = build(name)
    known = [*pipe._callback_tensor_inputs, tensor]
    monkeypatch.setattr(type(pipe), "_callback_tensor_inputs", known)
    lesa.enable(pipe, Taylor(1), schedule=THIRD)

    def change(_, values):
        return {tensor: values[tensor].mul_(2) if in_place else values[tensor] * 2}

    disturbed = call(
        callback_on_step_end=at_step(0, change), callback_on_step_end_tensor_inputs=[tensor]
    )
    disturbed = {k: v.clone() if torch.is_tensor(v) else v for k, v in disturbed.items()}
    assert new_fallbacks(pipe, disturbed) == ({reason: 1} if is_taken or in_place else {})
    check_nothing_stale(pipe, call)


@pytest.mark.parametrize("in_place", [False, True], ids=["new tensor", "in place"])
def test_a_callback_changes_the_latents(enabled, in_place):
    pipe, call = enabled
    first = run(pipe, call())

    def change(_, values):
        latents = values["latents"]
        return {"latents": latents.mul_(0.5) if in_place else latents * 0.5}

    disturbed = call(callback_on_step_end=at_step(1, change))
    found = run(pipe, disturbed)
    assert not torch.equal(found, first)
    assert torch.equal(run(fresh(pipe), disturbed | {"generator": call()["generator"]}), found)
    assert torch.equal(run(pipe, call()), first)


def test_a_callback_switches_guidance_off():
    """As in diffusers' guide: the batch of SDXL halves in the middle of the run."""
    pipe, call = build("sdxl")
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    names = ["prompt_embeds", "add_text_embeds", "add_time_ids"]

    def change(pipe, values):
        pipe._guidance_scale = 0.0
        return {name: values[name].chunk(2)[-1] for name in names}

    disturbed = call(
        callback_on_step_end=at_step(0, change), callback_on_step_end_tensor_inputs=names
    )
    assert new_fallbacks(pipe, disturbed) == {"latent changed in shape, dtype or device": 1}
    check_nothing_stale(pipe, call)


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_run_that_broke_off_in_a_callback(scheduler, step):
    """DDIM has no step index: its calls are counted."""
    pipe, call = build("sdxl")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    lesa.enable(pipe, Taylor(1), schedule=THIRD)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, call(callback_on_step_end=at_step(step, stop)))
    check_nothing_stale(pipe, call)
    assert lesa.stats(pipe).fallbacks == {}


@pytest.mark.parametrize("name", ["sdxl", "wan", "qwen"])
def test_an_interrupted_run(name):
    pipe, call = build(name)
    lesa.enable(pipe, Taylor(1), schedule=THIRD)

    def interrupt(pipe, _):
        pipe._interrupt = True

    run(pipe, call(callback_on_step_end=at_step(1, interrupt)))
    check_nothing_stale(pipe, call)
    assert lesa.stats(pipe).fallbacks == {}


def test_gradients_are_computed_in_full():
    pipe, call = build("flux")
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    first = run(pipe, call())
    without = type(pipe).__call__.__wrapped__  # the decorator of the call switches gradients off
    embeds = call()["prompt_embeds"].requires_grad_()
    with torch.enable_grad():
        image = without(pipe, **call(prompt_embeds=embeds, num_inference_steps=2)).images
    image.sum().backward()
    assert embeds.grad.abs().sum() > 0
    assert lesa.stats(pipe).fallbacks == {"grad is enabled": 4}
    assert torch.equal(run(pipe, call()), first)


class OrderNone(diffusers.FlowMatchEulerDiscreteScheduler):
    order = 0


def other_model():
    return LesaForecaster(metadata={"model_class": "SanaTransformer2DModel"})


REFUSED_AT_ONCE = {
    "another class": (lambda: {"forecaster": other_model()}, "SanaTransformer2DModel"),
    "another tap": (lambda: {"forecaster": LesaForecaster(), "tap": "hidden"}, "hidden"),
    "no schedule": (lambda: {"schedule": [0, 4]}, "not a Schedule; give one"),
}


@pytest.mark.parametrize("name", REFUSED_AT_ONCE)
def test_bad_input_is_refused_by_enable_and_changes_nothing(name):
    pipe, call = build("flux")
    expected, (options, message) = run(pipe, call()), REFUSED_AT_ONCE[name]
    with pytest.raises(LesaError, match=message):
        lesa.enable(pipe, **options())
    assert type(pipe.transformer) is diffusers.FluxTransformer2DModel
    assert torch.equal(run(pipe, call()), expected)


def test_bad_input_keeps_what_was_enabled_before():
    pipe, call = build("flux")
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    first = run(pipe, call())
    with pytest.raises(LesaError, match="SanaTransformer2DModel"):
        lesa.enable(pipe, other_model())
    assert torch.equal(run(pipe, call()), first)
    assert lesa.stats(pipe).generations == 2


REFUSED_AT_THE_FIRST_STEP = {
    "an index beyond the steps": (Reuse(), Schedule.explicit([0, 30]), "holds step 30"),
    "an index beyond, of another run": (Reuse(), Schedule.explicit([0, 9], 12), "holds step 9"),
    "other branches": (LesaForecaster(branches=("cond",)), THIRD, "'uncond' was not trained"),
}


@pytest.mark.parametrize("name", REFUSED_AT_THE_FIRST_STEP)
def test_a_run_that_contradicts_the_options_is_refused_before_its_first_step(name):
    pipe, call = build("flux")
    expected = run(pipe, call())
    forecaster, schedule, message = REFUSED_AT_THE_FIRST_STEP[name]
    lesa.enable(pipe, forecaster, schedule=schedule)
    steps = []
    count = call(callback_on_step_end=at_step(0, lambda *_: steps.append(1)))
    for _ in range(2):
        with pytest.raises(LesaError, match=message):
            run(pipe, count)
    assert not steps
    lesa.disable(pipe)
    assert torch.equal(run(pipe, call()), expected)


def test_a_scheduler_of_unknown_order_is_refused_before_the_first_step():
    pipe, call = build("flux")
    expected, before = run(pipe, call()), pipe.scheduler
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    first = run(pipe, call())
    pipe.scheduler = OrderNone.from_config(before.config)
    with pytest.raises(LesaError, match="OrderNone.order=0: not how many"):
        run(pipe, call())
    pipe.scheduler = before
    assert torch.equal(run(pipe, call()), first)
    lesa.disable(pipe)
    assert torch.equal(run(pipe, call()), expected)


def test_branches_without_a_name_are_not_refused():
    """Flux img2img sets no context: its second call is `default#1`, for any forecaster."""
    pipe, call = build("flux")
    pipe = diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    lesa.enable(pipe, LesaForecaster(branches=("cond", "uncond")), schedule=THIRD)
    reasons = new_fallbacks(pipe, call(image=image, strength=1.0))
    assert any("branch='default#1' was not trained" in reason for reason in reasons)
    assert lesa.stats(pipe).skipped == 4


def test_other_weights_warn_once_and_serve():
    pipe, call = build("flux")
    trained = {"model_class": "FluxTransformer2DModel", "model_hash": "feedbeef"}
    forecaster = LesaForecaster(branches=("cond", "uncond"), metadata=trained)
    with pytest.warns(UserWarning, match="other weights: model_hash='feedbeef'") as caught:
        lesa.enable(pipe, forecaster, schedule=THIRD)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check = run(pipe, call())
    assert torch.equal(run(pipe, call()), check)
    assert (lesa.stats(pipe).skipped, lesa.stats(pipe).fallbacks) == (16, {})
