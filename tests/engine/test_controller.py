"""The engine on a real FluxPipeline: what is skipped, what is kept, and what is never trusted."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)

import lesa
from lesa import LesaConfig, Reuse, Schedule, Table, Taylor
from lesa.engine.controller import CacheController
from lesa.engine.ring import Ring
from lesa.hooks.attach import attach, attached

FULL = Schedule.explicit([0, 4, 8, 11])
TAPS = ["output", "hidden"]


class Watched(CacheController):
    """A controller that notes which steps of which branch ran in full."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.full = {}

    def _full(self, denoiser, args, kwargs, call, trajectory):
        self.full.setdefault(call.step.branch, []).append(call.step.index)
        return super()._full(denoiser, args, kwargs, call, trajectory)


def watch(pipe, forecaster=None, **options):
    options.setdefault("schedule", FULL)
    controller = Watched(LesaConfig(forecaster or Reuse(), **options))
    attach(pipe.transformer, controller, pipe)
    return controller


def request_of(pipe):
    """What is kept of this thread's request."""
    return attached(pipe.transformer).clock.requests.now()


def fallbacks(controller):
    return controller.counters.snapshot().fallbacks


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("cfg", [False, True])
def test_interval_one_is_bit_identical(tiny_flux, inputs, tap, cfg):
    plain = tiny_flux(**inputs(steps=5, cfg=cfg)).images
    lesa.enable(tiny_flux, Taylor(2), schedule=Schedule.every(1), tap=tap)
    assert torch.equal(tiny_flux(**inputs(steps=5, cfg=cfg)).images, plain)
    found = lesa.stats(tiny_flux)
    assert (found.skipped, found.ring_bytes, found.fallbacks) == (0, 0, {})
    lesa.disable(tiny_flux)
    assert torch.equal(tiny_flux(**inputs(steps=5, cfg=cfg)).images, plain)


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("cfg", [False, True])
def test_blocks_run_on_full_steps_only_and_two_runs_are_equal(
    tiny_flux, inputs, executions, tap, cfg
):
    counts = executions(tiny_flux.transformer)
    controller = watch(tiny_flux, tap=tap)
    first = tiny_flux(**inputs(cfg=cfg)).images
    branches = ["cond", "uncond"] if cfg else ["cond"]
    assert controller.full == {branch: [0, 4, 8, 11] for branch in branches}
    assert set(counts.values()) == {4 * len(branches)} and len(counts) == 2
    assert torch.equal(tiny_flux(**inputs(cfg=cfg)).images, first)
    assert fallbacks(controller) == {}


def test_the_pipeline_follows_the_tables_own_arithmetic(tiny_flux, inputs):
    """Denoising by hand in float64 mixes, with the same full steps and the same scheduler."""
    pipe, call = tiny_flux, inputs(steps=6)
    schedule = Schedule.explicit([0, 1, 2], 6)
    model = pipe.transformer
    latents = []

    def keep(_, i, t, values):
        latents.append(values["latents"].clone())
        return values

    start = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(1))
    call |= {"latents": start, "callback_on_step_end": keep}
    lesa.enable(pipe, Taylor(2), schedule=schedule, tap="output")
    pipe(**call)
    lesa.disable(pipe)

    table = Taylor(2).table(schedule)
    sigmas, latent, ring = pipe.scheduler.sigmas.double(), start, []
    ids = pipe._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
    for step in range(6):
        if schedule.is_full(step):
            with torch.no_grad():
                velocity = model(
                    hidden_states=latent,
                    timestep=pipe.scheduler.timesteps[step].expand(1) / 1000,
                    pooled_projections=call["pooled_prompt_embeds"],
                    encoder_hidden_states=call["prompt_embeds"],
                    txt_ids=torch.zeros(6, 3),
                    img_ids=ids,
                ).sample
            ring.insert(0, velocity)
        else:
            velocity = table.apply(ring[:3], step)
        latent = (latent + (sigmas[step + 1] - sigmas[step]) * velocity.double()).float()
        assert torch.allclose(latent, latents[step], atol=1e-5)


def test_both_taps_agree_where_the_tail_has_no_time(tiny_flux, inputs):
    """norm_out is modulated by time; with that switched off reuse gives one result at both taps."""
    norm = tiny_flux.transformer.norm_out
    with torch.no_grad():
        norm.linear.weight.zero_()
    images = {}
    for tap in TAPS:
        lesa.enable(tiny_flux, Reuse(), schedule=FULL, tap=tap)
        images[tap] = tiny_flux(**inputs()).images
    torch.testing.assert_close(images["output"], images["hidden"], rtol=1e-6, atol=1e-6)


def test_the_ring_holds_no_more_than_any_step_reaches_back_to(tiny_flux, inputs):
    """TaylorSeer of second order with one full step, and with two."""
    for full in ([0], [0, 5]):
        lesa.enable(tiny_flux, Taylor(2), schedule=Schedule.explicit(full))
        tiny_flux(**inputs(size=64))
        assert lesa.stats(tiny_flux).ring_bytes == len(full) * 1024 * 4 * 4
        assert not lesa.stats(tiny_flux).fallbacks


@pytest.mark.parametrize("tap, width, order", [("output", 4, 2), ("hidden", 32, 1)])
def test_the_ring_is_k_features_and_nothing_else_is_kept(tiny_flux, inputs, tap, width, order):
    lesa.enable(tiny_flux, Taylor(order), schedule=FULL, tap=tap)
    extra, rings = [], []

    def census(pipe, i, t, values):
        if i != 9:
            return values
        gc.collect()
        real = (torch.Tensor, torch.nn.Parameter)  # torch.compile keeps fake ones of other tests
        found = [x for x in gc.get_objects() if type(x) in real]
        tensors = [x for x in found if x.layout is torch.strided]  # sparse ones have no storage
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        extra.append(sum(storages.values()))
        rings.append(sum(x.nbytes for x in gc.get_objects() if type(x) is Ring))
        return values

    tiny_flux(**inputs(batch=2, size=64, callback_on_step_end=census))
    feature = 2 * 1024 * width * 4
    assert lesa.stats(tiny_flux).ring_bytes == (order + 1) * feature
    assert set(rings) == {(order + 1) * feature}
    accelerated = extra
    extra = []
    lesa.disable(tiny_flux)
    tiny_flux(**inputs(batch=2, size=64, callback_on_step_end=census))
    grown = [with_ring - without for with_ring, without in zip(accelerated, extra, strict=True)]
    rows = 12 * 2 * 2 * width * 4 if tap == "hidden" else 0  # scale and shift of all steps
    assert max(grown) <= (order + 1) * feature + rows + 4096
    assert not any(type(x) is Ring for x in gc.get_objects())  # freed when the call ended


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["callback", "forward"])
@pytest.mark.parametrize("tap", TAPS)
def test_an_exception_leaves_nothing_behind(tiny_flux, inputs, error, place, tap):
    controller = watch(tiny_flux, Taylor(1), tap=tap)
    expected = tiny_flux(**inputs()).images

    def stop(*_):
        raise error

    if place == "callback":
        with pytest.raises(error):
            tiny_flux(**inputs(callback_on_step_end=lambda p, i, t, v: stop() if i == 6 else v))
    else:
        calls = []
        handle = tiny_flux.transformer.x_embedder.register_forward_hook(
            lambda *_: calls.append(1) or (stop() if len(calls) >= 3 else None)
        )
        with pytest.raises(error):
            tiny_flux(**inputs())
        handle.remove()
    controller.full.clear()
    assert torch.equal(tiny_flux(**inputs()).images, expected)
    assert controller.full == {"cond": [0, 4, 8, 11]}


def test_an_interrupted_pipeline_leaves_nothing_behind(tiny_flux, inputs):
    controller = watch(tiny_flux, Taylor(1))
    expected = tiny_flux(**inputs()).images

    def interrupt(pipe, i, t, values):
        pipe._interrupt = i == 5
        return values

    tiny_flux(**inputs(callback_on_step_end=interrupt))
    controller.full.clear()
    assert torch.equal(tiny_flux(**inputs()).images, expected)
    assert controller.full == {"cond": [0, 4, 8, 11]}


@pytest.mark.parametrize("tap", TAPS)
def test_batch_resolution_steps_and_dtype_may_change_between_calls(tiny_flux, inputs, tap):
    lesa.enable(tiny_flux, Taylor(1), schedule=Schedule.every(4), tap=tap)
    options = [{}, {"batch": 3}, {"size": 32}, {"steps": 15}, {"num_images_per_prompt": 2}, {}]
    first = [tiny_flux(**inputs(**o)).images for o in options]
    assert torch.equal(first[0], first[-1])
    assert lesa.stats(tiny_flux).fallbacks == {}
    for o, expected in zip(options, first, strict=True):  # same as with nothing before it
        lesa.enable(tiny_flux, Taylor(1), schedule=Schedule.every(4), tap=tap)
        assert torch.equal(tiny_flux(**inputs(**o)).images, expected)
    tiny_flux.transformer.to(torch.bfloat16)
    assert tiny_flux(**inputs(dtype=torch.bfloat16)).images.dtype == torch.bfloat16
    assert lesa.stats(tiny_flux).fallbacks == {}


@pytest.mark.parametrize("tap", TAPS)
def test_a_changed_prompt_is_computed_in_full_at_once(tiny_flux, inputs, tap):
    controller = watch(tiny_flux, tap=tap)

    def swap(pipe, i, t, values):
        return {"prompt_embeds": values["prompt_embeds"] * 2} if i == 5 else {}

    wanted = ["latents", "prompt_embeds"]
    call = {"callback_on_step_end": swap, "callback_on_step_end_tensor_inputs": wanted}
    tiny_flux(**inputs(**call))
    assert controller.full == {"cond": [0, 4, 6, 8, 11]}
    assert fallbacks(controller) == {"encoder_hidden_states changed": 1}


def test_a_prompt_written_in_place_is_noticed(tiny_flux, inputs):
    controller = watch(tiny_flux, Taylor(1))

    def scale(pipe, i, t, values):
        if i == 5:
            values["prompt_embeds"].mul_(2)
        return {}

    call = {
        "callback_on_step_end": scale,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    tiny_flux(**inputs(**call))
    assert controller.full == {"cond": [0, 4, 6, 8, 11]}


def test_img2img_of_another_pipeline_with_the_same_parts(tiny_flux, inputs):
    controller = watch(tiny_flux, schedule=Schedule.explicit([0, 3]))
    other = FluxImg2ImgPipeline.from_pipe(tiny_flux)
    other.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    first = other(**inputs(image=image, strength=0.5, cfg=True)).images
    assert controller.full == {"default": [0, 3], "default#1": [0, 3]}
    assert controller.counters.snapshot().num_steps == 6
    tiny_flux(**inputs())
    again = other(**inputs(image=image, strength=0.5, cfg=True)).images
    assert torch.equal(first, again)
    assert fallbacks(controller) == {}


def test_grad_enabled_is_computed_in_full(tiny_flux, inputs):
    controller = watch(tiny_flux)
    call = inputs()
    with torch.enable_grad():
        for _ in range(3):
            output = tiny_flux.transformer(
                hidden_states=torch.randn(1, 16, 4),
                encoder_hidden_states=call["prompt_embeds"],
                pooled_projections=call["pooled_prompt_embeds"],
                timestep=torch.tensor([0.5]),
                img_ids=torch.zeros(16, 3),
                txt_ids=torch.zeros(6, 3),
            ).sample
    assert output.requires_grad
    assert fallbacks(controller) == {"grad is enabled": 3}


def loop(model, inputs, scheduler, positional=False, change=None):
    """A denoising loop of one's own around the bare transformer."""
    call = inputs()
    latent = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(1))
    for index, time in enumerate(scheduler.timesteps):
        shape = (latent, call["prompt_embeds"], call["pooled_prompt_embeds"], time.expand(1) / 1000)
        ids = torch.zeros(16, 3), torch.zeros(6, 3)
        if change is not None and index == change:
            shape = tuple(torch.cat([part] * 2) for part in shape)
        if positional:
            output = model(*shape, *ids)
        else:
            names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
            output = model(**dict(zip(names, shape, strict=True)), img_ids=ids[0], txt_ids=ids[1])
        latent = scheduler.step(output.sample[:1], time, latent).prev_sample
    return latent


@torch.no_grad()
@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("source", ["scheduler", "sigmas"])
@pytest.mark.parametrize("tap", TAPS)
def test_a_bare_transformer_in_ones_own_loop(tiny_flux, inputs, positional, source, tap):
    model, scheduler = tiny_flux.transformer, FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(12)
    told = {"scheduler": scheduler}
    if source == "sigmas":
        told = {"num_inference_steps": 12, "sigmas": scheduler.sigmas.tolist()}
    lesa.apply_lesa_cache(model, LesaConfig(Taylor(1), schedule=FULL, tap=tap, **told))
    first = loop(model, inputs, scheduler, positional)
    scheduler.set_timesteps(12)
    assert torch.equal(loop(model, inputs, scheduler, positional), first)
    found = lesa.stats(model)
    assert (found.full, found.skipped, found.fallbacks) == (8, 16, {})
    lesa.remove_lesa_cache(model)
    assert type(model) is FluxTransformer2DModel


@torch.no_grad()
def test_a_changed_batch_inside_a_run_is_computed_in_full(tiny_flux, inputs):
    model, scheduler = tiny_flux.transformer, FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(12)
    lesa.apply_lesa_cache(model, LesaConfig(Reuse(), schedule=FULL, scheduler=scheduler))
    loop(model, inputs, scheduler, change=6)
    found = lesa.stats(model)
    assert found.fallbacks == {"latent changed in shape, dtype or device": 2}  # there and back
    assert (found.full, found.skipped) == (6, 6)


@torch.no_grad()
def test_inference_mode_may_come_and_go(tiny_flux, inputs):
    controller = watch(tiny_flux, Taylor(1))
    expected = tiny_flux(**inputs()).images
    with torch.inference_mode():
        found = tiny_flux(**inputs()).images
    assert torch.equal(found, expected)
    assert torch.equal(tiny_flux(**inputs()).images, expected)
    assert fallbacks(controller) == {}


class Latent:
    """Only the current latent, scaled: makes every wrong latent visible."""

    name, uses_latent, tap = "latent", True, "output"

    def history(self, schedule):
        return 1

    def table(self, schedule, sigmas, branch="cond"):
        rows = torch.zeros(schedule.steps, 2, dtype=torch.float64)
        for step in schedule.skipped_steps:
            rows[step] = torch.tensor([0.0, 0.5])
        return Table(schedule, rows, uses_latent=True)


class WindowOfSteps:
    """The paper's window: the forecasts enter the history too."""

    name, uses_latent, tap = "window", False, None

    def history(self, schedule):
        return 2

    def table(self, schedule, sigmas, branch="cond"):
        rows = torch.zeros(schedule.steps, 2, dtype=torch.float64)
        for step in schedule.skipped_steps:
            rows[step, 0] = 0.5
        return Table(schedule, rows, autoregressive=True)


def test_the_current_latent_is_a_regressor(tiny_flux, inputs):
    latents = []

    def keep(pipe, i, t, values):
        latents.append(values["latents"].clone())
        return values

    controller = watch(tiny_flux, Latent(), schedule=Schedule.explicit([0]))
    tiny_flux(**inputs(steps=4, callback_on_step_end=keep))
    assert controller.full == {"cond": [0]}
    for before, after in zip(latents, latents[1:], strict=False):
        assert torch.allclose(after, before - 0.25 * 0.5 * before, atol=1e-6)


def test_a_latent_of_another_shape_is_computed_in_full(inputs):
    model = FluxTransformer2DModel(
        in_channels=4,
        out_channels=3,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    config = LesaConfig(Latent(), schedule=Schedule.explicit([0]), scheduler=scheduler)
    lesa.apply_lesa_cache(model, config)
    call = inputs()
    with torch.no_grad():
        for time in scheduler.timesteps:
            sample = model(
                hidden_states=torch.randn(1, 16, 4),
                encoder_hidden_states=call["prompt_embeds"],
                pooled_projections=call["pooled_prompt_embeds"],
                timestep=time.expand(1) / 1000,
                img_ids=torch.zeros(16, 3),
                txt_ids=torch.zeros(6, 3),
            ).sample
            assert sample.shape == (1, 16, 3)
            scheduler.step(sample, time, sample)
    found = lesa.stats(model)
    assert (found.full, found.skipped) == (3, 0)
    assert found.fallbacks == {"latent and output differ in shape": 2}


@pytest.mark.parametrize("tap", TAPS)
def test_forecasts_enter_the_history_of_an_autoregressive_table(tiny_flux, inputs, tap):
    features = []
    controller = watch(tiny_flux, WindowOfSteps(), schedule=Schedule.explicit([0]), tap=tap)

    def keep(pipe, i, t, values):
        ring = request_of(tiny_flux).kept.trajectories["cond"].ring
        features.append(ring and ring.features[ring.order[0]].clone())
        return values

    tiny_flux(**inputs(steps=5, callback_on_step_end=keep))
    assert controller.full == {"cond": [0]}
    for before, after in zip(features[:3], features[1:4], strict=True):
        assert torch.equal(after, before * 0.5)
    assert features[4] is None  # no later step needs any


class Broken:
    """Fails in every way a forecaster can."""

    name, uses_latent, tap = "broken", False, None

    def __init__(self, error):
        self.error = error

    def history(self, schedule):
        return 1

    def table(self, schedule, sigmas, branch="cond"):
        raise self.error


@pytest.mark.parametrize(
    "error, reason",
    [
        (lesa.LesaError("branch is unknown"), "no table: branch is unknown"),
        (ZeroDivisionError("oops"), "ZeroDivisionError: oops"),
    ],
)
def test_a_failing_forecaster_costs_speed_only(tiny_flux, inputs, error, reason):
    plain = tiny_flux(**inputs()).images
    controller = watch(tiny_flux, Broken(error))
    assert torch.equal(tiny_flux(**inputs()).images, plain)
    assert reason in fallbacks(controller)
    assert controller.counters.snapshot().skipped == 0


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"schedule": Schedule.every(4, 50)}, "bound to 50 steps"),
        ({"schedule": None, "full_steps": 20}, "full_steps=20"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_costs_speed_only(tiny_flux, inputs, options, reason):
    plain = tiny_flux(**inputs()).images
    controller = watch(tiny_flux, **options)
    assert torch.equal(tiny_flux(**inputs()).images, plain)
    assert any(reason in why for why in fallbacks(controller))


def test_a_wrong_position_is_computed_in_full(tiny_flux, inputs):
    plain = tiny_flux(**inputs()).images
    controller = watch(tiny_flux)
    type_of_scheduler = type(tiny_flux.scheduler)

    class SecondOrder(type_of_scheduler):
        order = 2

    tiny_flux.scheduler.__class__ = SecondOrder
    assert torch.equal(tiny_flux(**inputs()).images, plain)
    assert fallbacks(controller) == {"scheduler of order 2": 12}


def test_enabled_in_the_middle_of_a_run(tiny_flux, inputs):
    controllers = []

    def late(pipe, i, t, values):
        if i == 4:
            controllers.append(watch(pipe))
        return values

    tiny_flux(**inputs(callback_on_step_end=late))
    assert controllers[0].full == {"cond": [5, 8, 11]}
    assert fallbacks(controllers[0]) == {"no history at a later step": 1}


def test_two_threads_and_pipelines_share_a_transformer(tiny_flux, inputs):
    def second():
        parts = {**tiny_flux.components, "scheduler": FlowMatchEulerDiscreteScheduler()}
        pipe = FluxPipeline(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    pipes = [tiny_flux, second()]
    jobs = [{"steps": 12, "batch": 1}, {"steps": 17, "batch": 2}]
    for pipe in pipes:
        lesa.enable(pipe, Taylor(1), schedule=Schedule.every(4), tap="hidden")
    serial = [p(**inputs(**job)).images for p, job in zip(pipes, jobs, strict=True)]
    before = lesa.stats(tiny_flux)
    found = [[], []]

    def work(number):
        for _ in range(2):
            found[number].append(pipes[number](**inputs(**jobs[number])).images)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, images in zip(serial, found, strict=True):
        assert len(images) == 2 and all(torch.equal(image, expected) for image in images)
    after = lesa.stats(tiny_flux)
    assert after.fallbacks == {}
    assert (after.full, after.skipped) == (before.full * 3, before.skipped * 3)


def test_a_deepcopy_of_an_enabled_pipeline_is_plain(tiny_flux, inputs, executions):
    plain = tiny_flux(**inputs()).images
    watch(tiny_flux)
    clone = copy.deepcopy(tiny_flux)
    counts = executions(clone.transformer)
    assert torch.equal(clone(**inputs()).images, plain)
    assert set(counts.values()) == {12}


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_full_step_that_is_not_finite_is_counted(tiny_flux, inputs, caplog, tap, value):
    """In the middle of a run: the feature of step 4 is spoilt, of four full steps."""
    lesa.enable(tiny_flux, Reuse(), schedule=FULL, tap=tap)
    tiny_flux(**inputs())
    assert lesa.stats(tiny_flux).not_finite == 0
    calls = []

    def spoil(module, given, output):
        calls.append(1)
        if len(calls) != 2:
            return None
        whole = output if isinstance(output, torch.Tensor) else output[-1]
        whole.view(-1)[-1] = value
        return output

    model = tiny_flux.transformer
    spoilt = model.proj_out if tap == "output" else model.single_transformer_blocks[-1]
    hook = spoilt.register_forward_hook(spoil)
    with caplog.at_level("WARNING", "lesa"):
        tiny_flux(**inputs())
        found = lesa.stats(tiny_flux)
    hook.remove()
    # what follows from it is not finite either
    assert found.not_finite >= 1 and "NaN or inf" in str(found)
    assert sum("NaN or inf" in line for line in caplog.messages) == 1
