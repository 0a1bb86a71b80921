"""Steps, branches and generations, told from real schedulers and pipelines."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from tiny_pipelines import build

from lesa.errors import LesaError
from lesa.hooks.attach import attach
from lesa.hooks.noise_levels import _reads, noise_levels
from lesa.hooks.step_clock import StepClock


class Recorder:
    """A controller that runs every call in full and notes its step."""

    def __init__(self):
        self.steps = []

    def __call__(self, denoiser, args, kwargs):
        self.steps.append(denoiser.clock.tick(kwargs))
        return denoiser.run(args, kwargs)[0]


def flow(steps, begin=None):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    if begin is not None:
        scheduler.set_begin_index(begin)
    return scheduler


def advance(scheduler, sample=None):
    sample = torch.zeros(1, 2) if sample is None else sample
    index = scheduler.step_index or scheduler.begin_index or 0
    scheduler.step(sample, scheduler.timesteps[index], sample)


def test_pipeline_steps_and_sigmas(tiny_flux, inputs):
    recorder = Recorder()
    attach(tiny_flux.transformer, recorder, tiny_flux)
    tiny_flux(**inputs(steps=5))
    steps = recorder.steps
    assert [s.index for s in steps] == [0, 1, 2, 3, 4]
    assert {(s.num_steps, s.branch, s.problem) for s in steps} == {(5, "cond", None)}
    assert [s.fresh for s in steps] == [True, False, False, False, False]
    assert list(steps[0].sigmas) == tiny_flux.scheduler.sigmas.tolist()
    assert steps[0].sigmas[0] == 1.0 and steps[0].sigmas[-1] == 0.0


def test_true_cfg_has_two_branches(tiny_flux, inputs):
    recorder = Recorder()
    attach(tiny_flux.transformer, recorder, tiny_flux)
    tiny_flux(**inputs(steps=3, cfg=True))
    assert [(s.index, s.branch) for s in recorder.steps] == [
        (index, branch) for index in range(3) for branch in ("cond", "uncond")
    ]
    assert [s.fresh for s in recorder.steps] == [True] + [False] * 5


@pytest.mark.parametrize(
    ("call_with", "parts"),
    [
        ({"guidance_scale": 5.0}, 2),
        ({"guidance_scale": 1.0}, 1),
        ({"guidance_scale": 5.0, "guidance_rescale": 0.7}, 1),
    ],
)
def test_batched_guidance_is_known_by_its_parts(call_with, parts):
    pipe, call = build("sdxl")
    recorder = Recorder()
    attach(pipe.unet, recorder, pipe)
    pipe(**{**call(1), **call_with})
    assert {step.parts for step in recorder.steps} == {parts}


@pytest.mark.parametrize("strength, executed", [(0.5, 6), (0.9, 11), (1.0, 12)])
def test_img2img_counts_only_the_executed_steps(tiny_flux, inputs, strength, executed):
    recorder = Recorder()
    attach(tiny_flux.transformer, recorder, tiny_flux)
    tiny_flux(**inputs(steps=4))  # leaves `_num_timesteps` of another run behind
    recorder.steps.clear()
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    other = FluxImg2ImgPipeline.from_pipe(tiny_flux)
    other.set_progress_bar_config(disable=True)
    other(**inputs(image=image, strength=strength, cfg=True))
    steps = recorder.steps
    assert [s.index for s in steps[::2]] == list(range(executed))
    assert {s.num_steps for s in steps} == {executed}
    assert {s.problem for s in steps} == {None}
    assert {s.branch for s in steps[::2]} == {"default"}  # this pipeline sets no context
    assert {s.branch for s in steps[1::2]} == {"default#1"}
    assert len(steps[0].sigmas) == executed + 1


def test_new_timesteps_or_a_backward_step_begin_a_generation():
    scheduler = flow(4)
    clock = StepClock(scheduler=scheduler)
    assert clock.tick().fresh
    advance(scheduler)
    assert (clock.tick().index, clock.tick().fresh) == (1, False)
    scheduler.set_timesteps(4)
    step = clock.tick()
    assert (step.index, step.fresh) == (0, True)
    advance(scheduler)
    clock.tick()
    scheduler._step_index = 0
    assert clock.tick().fresh


def test_reset_begins_a_generation():
    clock = StepClock(scheduler=flow(4))
    clock.tick()
    clock.reset()
    assert clock.tick().fresh


def test_context_fields_come_first():
    clock = StepClock(scheduler=flow(4))
    with clock.context("cond", {"step_index": 2, "num_inference_steps": 4}):
        step = clock.tick()
    assert (step.index, step.num_steps, step.branch) == (2, 4, "cond")
    with clock.context("a", {}), clock.context("b", {}):
        assert clock.tick().branch == "b"
    assert clock.tick().branch == "default"


def test_begin_index_shifts_steps():
    scheduler = flow(10, begin=4)
    clock = StepClock(scheduler=scheduler)
    indices = []
    for _ in range(6):
        indices.append(clock.tick().index)
        advance(scheduler)
    assert indices == [0, 1, 2, 3, 4, 5]
    assert clock.tick().problem == "step outside the run"


def test_counting_with_branches_and_a_restart():
    clock = StepClock(num_steps=3)
    seen = []
    for _ in range(2):
        for time in (0.9, 0.6, 0.3):
            for name in ("cond", "uncond"):
                with clock.context(name, {}):
                    step = clock.tick({"timestep": torch.tensor([time])})
                seen.append((step.index, step.branch, step.fresh))
    once = [(i, name, False) for i in range(3) for name in ("cond", "uncond")]
    once[0] = (0, "cond", True)
    assert seen == once * 2
    assert step.sigmas == (1.0, pytest.approx(2 / 3), pytest.approx(1 / 3), 0.0)


def test_counting_sees_a_rising_time_after_an_interrupted_loop():
    clock = StepClock(sigmas=[1.0, 0.6, 0.3, 0.0])
    for time in (1.0, 0.6):
        clock.tick({"timestep": torch.tensor([time])})
    step = clock.tick({"timestep": torch.tensor([1.0])})
    assert (step.index, step.fresh) == (0, True)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("own", [True, False], ids=["own levels", "scheduler"])
def test_counting_sees_the_first_time_come_again(own, steps):
    """After an interrupted loop, or a whole one, whose times were set once for all."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(3)
    clock = StepClock(num_steps=3) if own else StepClock(scheduler=scheduler)
    for time in scheduler.timesteps[:steps]:
        clock.tick({"timestep": time})
    found = [clock.tick({"timestep": time}) for time in scheduler.timesteps]
    assert [(step.index, step.fresh) for step in found] == [(0, True), (1, False), (2, False)]


@pytest.mark.parametrize("kind", [int, float, np.float32, lambda t: torch.tensor([float(t)])])
def test_a_time_is_a_number_of_any_kind(kind):
    """The loop steps copies of the scheduler, and makes the number anew for each branch."""
    scheduler, found = FlowMatchEulerDiscreteScheduler(), []
    scheduler.set_timesteps(3)
    clock = StepClock(scheduler=scheduler)
    for time in ("1000", "667", "334"):
        for name in ("cond", "uncond"):
            with clock.context(name, {}):
                found.append(clock.tick({"timestep": kind(int(time))}).index)
    assert found == [0, 0, 1, 1, 2, 2]


def test_a_scheduler_without_a_step_index_is_counted():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(3)
    clock = StepClock(scheduler=scheduler)
    assert [clock.tick().index for _ in range(3)] == [0, 1, 2]
    assert clock.tick().problem == "step outside the run"
    scheduler.set_timesteps(3)
    assert clock.tick().fresh


def test_nothing_known_is_a_problem_not_an_error():
    assert StepClock().tick().problem == "no scheduler and no num_inference_steps"


def test_a_scheduler_that_stands_still_is_noticed():
    clock = StepClock(scheduler=flow(4))
    problems = [clock.tick().problem for _ in range(6)]
    assert problems[0] is None and problems[-1] == "scheduler does not advance"


def test_second_order_schedulers_are_named():
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(4)
    assert StepClock(scheduler=scheduler).tick().problem == "scheduler of order 2"


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(),
        EulerDiscreteScheduler(use_karras_sigmas=True),
        DPMSolverMultistepScheduler(),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        DDIMScheduler(timestep_spacing="trailing"),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=lambda s: type(s).__name__,
)
def test_noise_levels_decrease_within_the_unit_interval(scheduler):
    scheduler.set_timesteps(7)
    levels = noise_levels(scheduler, 2, 5)
    assert levels is not None and len(levels) == 6
    assert all(1 >= a > b >= 0 for a, b in zip(levels, levels[1:], strict=False))


def test_variance_preserving_sigmas_are_mapped():
    euler, ddim = EulerDiscreteScheduler(), DDIMScheduler(timestep_spacing="linspace")
    euler.set_timesteps(5)
    ddim.set_timesteps(5)
    sigma = euler.sigmas[0].item()
    assert noise_levels(euler, 0, 5)[0] == pytest.approx(sigma / (1 + sigma))
    assert noise_levels(ddim, 0, 5) == pytest.approx(noise_levels(euler, 0, 5), abs=2e-3)


def test_levels_that_do_not_fall_leave_a_clock_in_steps():
    """Custom ones, of which two are equal."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.7, 0.2])
    clock, steps = StepClock(scheduler=scheduler), []
    for _ in range(4):
        steps.append(clock.tick())
        advance(scheduler)
    assert [(step.index, step.num_steps, step.problem) for step in steps] == [
        (index, 4, None) for index in range(4)
    ]
    assert {step.sigmas for step in steps} == {()}
    generation = steps[0].generation
    assert generation.levels_problem == (
        "the noise levels of FlowMatchEulerDiscreteScheduler repeat"
    )
    assert generation.times == pytest.approx((1000.0, 700.0, 700.0, 200.0))


@pytest.mark.parametrize(
    "options, field",
    [
        ({"num_steps": 0}, "num_inference_steps=0"),
        ({"num_steps": 3, "sigmas": [1.0, 0.0]}, "give 4"),
        ({"sigmas": [0.5, 0.5]}, "strictly decreasing"),
        ({"sigmas": [14.6, 0.0]}, "strictly decreasing"),
        ({"sigmas": "10"}, "sigmas='10': not a list of numbers"),
        ({"sigmas": ["1", "0"]}, r"sigmas\[0\]='1': not a finite number"),
    ],
)
def test_a_wrong_loop_is_refused(options, field):
    with pytest.raises(LesaError, match=field):
        StepClock(**options)


def test_two_pipelines_in_two_threads_keep_their_own_steps(tiny_flux, inputs):
    from diffusers import FluxPipeline

    recorder = Recorder()
    parts = {**tiny_flux.components, "scheduler": FlowMatchEulerDiscreteScheduler()}
    other = FluxPipeline(**parts)
    other.set_progress_bar_config(disable=True)
    denoiser = attach(tiny_flux.transformer, recorder, tiny_flux)
    denoiser.clock.add_pipe(other)
    by_thread = {}

    class PerThread:
        def __call__(self, denoiser, args, kwargs):
            step = denoiser.clock.tick(kwargs)
            by_thread.setdefault(threading.get_ident(), []).append((step.index, step.num_steps))
            return denoiser.run(args, kwargs)[0]

    denoiser.controller = PerThread()
    threads = [
        threading.Thread(target=pipe, kwargs=inputs(steps=steps))
        for pipe, steps in ((tiny_flux, 5), (other, 9))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = sorted(by_thread.values(), key=len)
    assert found == [[(i, n) for i in range(n)] for n in (5, 9)]


def test_the_pipeline_is_not_kept_alive(tiny_flux):
    from diffusers import FluxPipeline

    other = FluxPipeline(**tiny_flux.components)
    clock = StepClock(other)
    clock.add_pipe(other)
    clock.add_pipe(tiny_flux)
    assert clock.pipes == [other, tiny_flux]
    del other
    gc.collect()
    assert clock.pipes == [tiny_flux]


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU and counts how often the host reads it."""

    reads = 0

    @property
    def device(self):
        return torch.device("cuda:0")

    def tolist(self):
        OnDevice.reads += 1
        return self.as_subclass(torch.Tensor).tolist()


def on_device(scheduler, **options):
    """A schedule as `set_timesteps` leaves it on a GPU."""
    scheduler.set_timesteps(**options)
    for name in {"sigmas", "timesteps"} & vars(scheduler).keys():
        setattr(scheduler, name, getattr(scheduler, name).clone().as_subclass(OnDevice))
    return scheduler


@pytest.fixture
def reads(monkeypatch):
    """How often the host has read a device since the last call of it."""

    def since():
        count, OnDevice.reads = OnDevice.reads, 0
        return count

    since()
    return since


def test_sigmas_on_a_device_are_read_once(reads):
    scheduler = on_device(FlowMatchEulerDiscreteScheduler(), num_inference_steps=6)
    first = noise_levels(scheduler, 0, 6)
    assert (noise_levels(scheduler, 0, 6), noise_levels(scheduler, 2, 4)) == (first, first[2:])
    assert reads() == 1
    clock = StepClock(scheduler=scheduler)
    for _ in range(2):  # the second call begins a generation with the same tensor
        assert clock.tick().sigmas == first
        clock.reset()
    assert reads() == 0


def test_sigmas_are_read_again_where_they_may_have_changed(reads):
    scheduler = on_device(FlowMatchEulerDiscreteScheduler(), num_inference_steps=4)
    found = [noise_levels(scheduler, 0, 4)]
    with torch.no_grad():
        scheduler.sigmas.mul_(0.5)  # in place
    found.append(noise_levels(scheduler, 0, 4))
    scheduler.sigmas.data = torch.tensor([0.8, 0.6, 0.4, 0.2, 0.0])  # counted by no version
    found.append(noise_levels(scheduler, 0, 4))
    on_device(scheduler, sigmas=[0.9, 0.7, 0.5, 0.1])  # custom ones
    found.append(noise_levels(scheduler, 0, 4))
    other = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for mu in (0.5, 1.1):
        on_device(other, num_inference_steps=4, mu=mu)
        found.append(noise_levels(other, 0, 4))
    assert len(set(found)) == reads() == 6


def test_what_was_read_is_forgotten_with_its_tensor(reads):
    """So a later tensor that gets the same `id` is a new one."""
    gc.collect()
    before = len(_reads)
    scheduler = on_device(FlowMatchEulerDiscreteScheduler(), num_inference_steps=4)
    noise_levels(scheduler, 0, 4)
    assert len(_reads) == before + 1
    del scheduler
    assert len(_reads) == before


def test_what_counts_no_writes_is_read_every_time(reads):
    with torch.inference_mode():
        scheduler = on_device(FlowMatchEulerDiscreteScheduler(), num_inference_steps=4)
        first = noise_levels(scheduler, 0, 4)
        scheduler.sigmas.mul_(0.5)
        assert noise_levels(scheduler, 0, 4) == tuple(level / 2 for level in first)
    assert reads() == 2


def test_timesteps_on_a_device_are_read_once(reads):
    plain, scheduler = DDIMScheduler(), on_device(DDIMScheduler(), num_inference_steps=5)
    plain.set_timesteps(5)
    for _ in range(2):
        assert noise_levels(scheduler, 0, 5) == noise_levels(plain, 0, 5)
    assert reads() == 1


def test_a_loop_that_passes_one_time_at_all_steps_goes_on():
    clock = StepClock(num_steps=4)
    same = {"sample": torch.ones(1), "timestep": torch.tensor([7.0])}
    told = [clock.tick(same) for _ in range(8)]
    assert [(step.index, step.fresh) for step in told] == [
        (index, index == 0) for _ in range(2) for index in range(4)
    ]


@pytest.mark.parametrize("times", [(0.9, 0.6, 0.2), (0.0, 0.4, 0.7)], ids=["falling", "rising"])
@pytest.mark.parametrize("start", [0.0, 0.05])
def test_a_time_may_fall_or_rise_and_turns_where_a_loop_begins_anew(times, start):
    """Some models count time upwards; the second loop may begin elsewhere (another strength)."""
    clock = StepClock(num_steps=3)
    sign = 1 if times[0] > times[1] else -1
    second = [time - sign * start for time in times]
    told = [clock.tick({"timestep": torch.tensor([time])}) for time in (*times[:2], *second)]
    assert [(step.index, step.fresh) for step in told] == [
        (0, True), (1, False), (0, True), (1, False), (2, False),
    ]  # fmt: skip


@pytest.mark.parametrize("own", [True, False], ids=["own levels", "scheduler"])
def test_two_guidance_calls_without_names_are_one_step(own):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(3)
    clock = StepClock(num_steps=3) if own else StepClock(scheduler=scheduler)
    prompts, told = torch.ones(2, 1).unbind(), []
    for _ in range(2):
        for time in scheduler.timesteps:
            latent = torch.ones(1)
            for prompt in prompts:
                call = {"sample": latent, "timestep": time, "encoder_hidden_states": prompt}
                told.append(clock.tick(call))
    assert [(step.index, step.branch) for step in told] == 2 * [
        (index, branch) for index in range(3) for branch in ("default", "default#1")
    ]
    assert [step.fresh for step in told] == 2 * [True, *5 * [False]]


def test_calls_in_a_generator_expression_are_of_the_loop_around_it():
    clock, told = StepClock(num_steps=3), []

    def step(latent, time):
        calls = ({"sample": latent, "timestep": time, "encoder_hidden_states": p} for p in prompts)
        told.extend(clock.tick(call) for call in calls)

    prompts = torch.ones(2, 1).unbind()
    for time in torch.tensor([0.9, 0.6, 0.2]).unbind():
        step(torch.ones(1), time)
    assert [(step.index, step.branch) for step in told] == [
        (index, branch) for index in range(3) for branch in ("default", "default#1")
    ]
    assert [step.fresh for step in told] == [True, *5 * [False]]
