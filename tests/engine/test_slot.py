"""Steps of several requests in one thread: each in its slot is what it is alone."""

from __future__ import annotations

import asyncio
import copy
import gc
import threading
import time

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipelines import build
from torch import nn

import lesa
from lesa import LesaConfig, LesaError, Schedule, Taylor
from lesa.engine import pool, tail
from lesa.hooks.attach import attached

TAPS = ["output", "hidden"]


class Loop:
    """The denoising of one request, a step at a time, on the bare transformer."""

    def __init__(self, model, inputs, seed, steps=8, size=4, slot=None):
        draw = torch.Generator().manual_seed(seed)
        call = inputs()
        self.model, self.slot = model, slot
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.scheduler.set_timesteps(steps)
        self.latent = torch.randn(1, size * size, 4, generator=draw)
        self.prompts = {
            "encoder_hidden_states": call["prompt_embeds"] + seed,
            "pooled_projections": call["pooled_prompt_embeds"],
        }
        self.ids = {"img_ids": torch.zeros(size * size, 3), "txt_ids": torch.zeros(6, 3)}

    @property
    def over(self):
        return self.scheduler.step_index == len(self.scheduler.timesteps)

    @property
    def time(self):
        return self.scheduler.timesteps[self.scheduler.step_index or 0]

    def arguments(self):
        return {
            "hidden_states": self.latent,
            "timestep": self.time.expand(1) / 1000,
            **self.prompts,
            **self.ids,
        }

    def advance(self, velocity):
        self.latent = self.scheduler.step(velocity, self.time, self.latent).prev_sample

    def step(self):
        self.advance(self.model(**self.arguments()).sample)


@pytest.fixture
def model(tiny_flux):
    """Accelerated; a step of one's own loop tells its times by the slot's scheduler."""
    with torch.no_grad():
        yield tiny_flux.transformer


def enable(model, **options):
    """With lesa's own forecaster, which has a list for every count."""
    lesa.apply_lesa_cache(model, LesaConfig(full_steps=3, **options))


def made(model, inputs, seed, steps, size, **budget):
    """A request, not yet begun, in a slot of its own."""
    loop = Loop(model, inputs, seed, steps, size)
    loop.slot = lesa.Slot(model, scheduler=loop.scheduler, **budget)
    return loop


MIXED = [
    (1, 8, 4, {}),
    (2, 8, 4, {"full_steps": 5}),
    (3, 6, 4, {"target_speedup": 3}),
    (4, 8, 2, {"full_steps": 2}),
    (5, 7, 4, {"off": True}),
]


def alone(model, inputs, row):
    seed, steps, size, budget = row
    loop = made(model, inputs, seed, steps, size, **budget)
    while not loop.over:
        with loop.slot:
            loop.step()
    return loop.latent


@pytest.mark.parametrize("tap", TAPS)
def test_interleaved_steps_are_those_of_requests_alone(model, inputs, tap):
    enable(model, tap=tap)
    expected = [alone(model, inputs, row) for row in MIXED]
    before = lesa.stats(model)
    loops = [made(model, inputs, *row[:3], **row[3]) for row in MIXED]
    late = loops.pop(0)  # joins when the others are at their third step
    turn = 0
    while not all(loop.over for loop in [*loops, late]):
        turn += 1
        for loop in [*loops, *([late] if turn > 2 else [])]:
            if not loop.over:
                with loop.slot:
                    loop.step()
    assert all(
        torch.equal(loop.latent, picture)
        for loop, picture in zip([late, *loops], expected, strict=True)
    )
    after = lesa.stats(model)
    assert (after.full - before.full, after.fallbacks) == (3 + 5 + 2 + 2, {})
    assert lesa.stats(model).pool["used"] == 0


def test_more_schedules_at_once_than_are_remembered(model, inputs, monkeypatch):
    """The times of a run in progress stay, whatever other requests bring."""
    monkeypatch.setattr(tail, "_MAX_SCHEDULES", 2)
    rows = [(seed, 5 + seed, 4, {}) for seed in range(4)]
    enable(model, tap="hidden")
    expected = [alone(model, inputs, row) for row in rows]
    enable(model, tap="hidden")
    loops = [made(model, inputs, *row[:3]) for row in rows]
    while not all(loop.over for loop in loops):
        for loop in loops:
            if not loop.over:
                with loop.slot:
                    loop.step()
    for loop, picture in zip(loops, expected, strict=True):
        assert torch.equal(loop.latent, picture)
    controller = attached(model).controller
    del loops, loop  # whose slots hold the last trajectories
    gc.collect()
    assert len(controller.tap._tail._live) == len(controller.tap._tail._recent) == 2


def test_a_slot_is_the_state_that_a_thread_has_without_one(model, inputs):
    """The same loop without a slot, its scheduler named to the cache."""
    enable(model)
    expected = alone(model, inputs, MIXED[0])
    loop = Loop(model, inputs, 1)
    enable(model, scheduler=loop.scheduler)
    while not loop.over:
        loop.step()
    assert torch.equal(loop.latent, expected)


def test_a_whole_pipeline_call_in_a_slot(tiny_flux, inputs):
    """Also between the steps of a call that has none, and with guidance."""
    lesa.enable(tiny_flux, Taylor(1), schedule=Schedule.every(4))
    expected = tiny_flux(**inputs(cfg=True)).images
    other = type(tiny_flux).from_pipe(tiny_flux, scheduler=copy.deepcopy(tiny_flux.scheduler))
    other.set_progress_bar_config(disable=True)
    found = []

    def inside(pipe, i, t, values):
        if i == 5:
            with lesa.Slot(other):
                found.append(other(**inputs(cfg=True)).images)
        return values

    found.append(tiny_flux(**inputs(cfg=True, callback_on_step_end=inside)).images)
    assert len(found) == 2 and all(torch.equal(image, expected) for image in found)
    assert lesa.stats(tiny_flux).fallbacks == {}


def test_tasks_that_interleave_their_steps(model, inputs):
    enable(model)
    expected = [alone(model, inputs, row) for row in MIXED]

    async def request(row):
        loop = made(model, inputs, *row[:3], **row[3])
        loop.slot.install()  # holds in this task alone
        while not loop.over:
            loop.step()
            await asyncio.sleep(0)
        return loop.latent

    async def all_of_them():
        return await asyncio.gather(*map(request, MIXED))

    found = asyncio.run(all_of_them())
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert lesa.stats(model).fallbacks == {}


def test_a_step_that_the_server_tells(model, inputs):
    """All requests use one scheduler's times, which nobody has to look at."""
    enable(model)
    shared = FlowMatchEulerDiscreteScheduler()
    shared.set_timesteps(8)
    levels = shared.sigmas.tolist()
    loops = [Loop(model, inputs, seed) for seed in (1, 2)]
    expected = [alone(model, inputs, (seed, 8, 4, {})) for seed in (1, 2)]
    for loop in loops:
        loop.slot = lesa.Slot(model, sigmas=levels, num_inference_steps=8)
    for index in range(8):
        for loop in loops:
            loop.slot.step_index = index
            loop.slot.install()
            loop.step()
            loop.slot.deactivate()
    assert all(torch.equal(a.latent, b) for a, b in zip(loops, expected, strict=True))
    assert lesa.stats(model).fallbacks == {}


def test_an_aborted_request_gives_its_memory_back(model, inputs):
    enable(model, memory_limit=2**20)
    expected = alone(model, inputs, MIXED[0])
    loop = made(model, inputs, *MIXED[0][:3])
    for _ in range(3):
        with loop.slot:
            loop.step()
    assert loop.slot.bytes == lesa.stats(model).pool["used"] > 0
    loop.slot.clear()
    assert loop.slot.bytes == lesa.stats(model).pool["used"] == 0
    again = Loop(model, inputs, 1)
    slot = lesa.Slot(model, scheduler=again.scheduler)
    while not again.over:
        with slot:
            again.step()
    assert torch.equal(again.latent, expected)


def test_a_request_that_stopped_without_a_word(model, inputs, monkeypatch):
    """There is room for one ring; if it comes back, it goes on with a full step."""
    monkeypatch.setattr(pool, "_GRACE", 4)
    enable(model)
    alone(model, inputs, MIXED[0])
    enable(model, memory_limit=lesa.stats(model).ring_bytes)
    gone, other = (made(model, inputs, seed, 8, 4) for seed in (1, 2))
    for _ in range(4):
        with gone.slot:
            gone.step()
    while not other.over:
        with other.slot:
            other.step()
    stats = lesa.stats(model)
    assert stats.pool["evicted"] == 1 and stats.pool["refused"] >= 1 and stats.skipped > 0
    while not gone.over:
        with gone.slot:
            gone.step()
    assert any("which had stopped" in reason for reason in lesa.stats(model).fallbacks)


def test_two_slots_on_one_scheduler_are_noticed(model, inputs):
    enable(model)
    loops = [made(model, inputs, seed, 8, 4) for seed in (1, 2)]
    loops[1].scheduler = loops[0].scheduler
    slots = [lesa.Slot(model, scheduler=loops[0].scheduler) for _ in loops]
    for _ in range(3):
        for loop, slot in zip(loops, slots, strict=True):
            with slot:
                loop.step()
    (reason,) = lesa.stats(model).fallbacks
    assert "two requests use one scheduler: give each slot one of its own" in reason


def test_two_threads_in_one_slot_are_noticed(model, inputs):
    enable(model)
    loop = made(model, inputs, *MIXED[0][:3])
    inside, go_on = threading.Event(), threading.Event()

    def hold(*_):
        inside.set()
        go_on.wait(60)

    handle = model.x_embedder.register_forward_pre_hook(hold)

    def first():
        with torch.no_grad(), loop.slot:
            loop.step()

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(60)
    handle.remove()
    other, found = Loop(model, inputs, 2), []

    def second():
        with torch.no_grad(), loop.slot:
            found.append(model(**other.arguments()).sample)

    late = threading.Thread(target=second)
    late.start()
    by = time.monotonic() + 60
    while not lesa.stats(model).fallbacks and time.monotonic() < by:
        time.sleep(0.001)  # the second thread waits for the model, once it has found the slot taken
    go_on.set()
    thread.join()
    late.join()
    assert lesa.stats(model).fallbacks == {"two threads use one slot": 1}
    lesa.remove_lesa_cache(model)
    assert torch.equal(found[0], model(**other.arguments()).sample)


def test_what_a_slot_can_go_on_with(model, inputs):
    enable(model)
    loop = made(model, inputs, *MIXED[0][:3])
    slot, latent = loop.slot, loop.latent
    assert slot.is_compatible(num_inference_steps=20, latent=torch.zeros(1))  # in no run yet
    with slot:
        loop.step()
    assert slot.is_compatible(num_inference_steps=8, latent=latent)
    assert not slot.is_compatible(num_inference_steps=9)
    assert not slot.is_compatible(latent=latent.double())
    with pytest.raises(LesaError, match="num_inference_steps=9: the slot is in a run of 8 steps"):
        slot.install(num_inference_steps=9)
    with pytest.raises(LesaError, match=r"latent=a tensor \[1, 4, 4\]: .* another shape"):
        slot.install(latent=latent[:, :4])
    other = copy.deepcopy(model)
    assert slot.is_compatible(model) and not slot.is_compatible(other)
    with pytest.raises(LesaError, match="the slot was made for a FluxTransformer2DModel that is"):
        slot.install(other)
    enable(model)
    assert not slot.is_compatible()
    with pytest.raises(LesaError, match="slot: lesa was enabled anew or disabled since"):
        slot.install()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"full_steps": 0}, "full_steps=0"),
        ({"full_steps": 9, "num_inference_steps": 8}, "full_steps=9: the run has 8 steps"),
        ({"scheduler": 3}, "scheduler=3: not a diffusers scheduler"),
        ({"target_psnr": 40}, "target_psnr=40: .* no decibels"),
        ({"num_inference_steps": 8, "sigmas": [1.0, 0.0]}, "sigmas"),
    ],
)
def test_a_slot_refuses_at_once(model, given, told):
    enable(model)
    with pytest.raises(LesaError, match=told):
        lesa.Slot(model, **given)


def test_a_slot_of_a_pipeline_that_is_not_enabled(tiny_flux):
    with pytest.raises(LesaError, match="not accelerated; call lesa.enable first"):
        lesa.Slot(tiny_flux)


def batched(model, loops):
    """One call for all of them, as a server makes it."""
    given = [loop.arguments() for loop in loops]
    joined = {
        name: torch.cat([each[name] for each in given]) for name in given[0] if "_ids" not in name
    }
    return model(**joined, **loops[0].ids).sample


@pytest.mark.parametrize("tap", TAPS)
def test_requests_at_different_steps_in_one_batch(model, inputs, executions, tap):
    """Each joins a step later than the one before it, with a budget of its own; skipped rows are
    forecast where others of the batch are computed. A batch is computed in another order than a
    row, so that pictures agree to rounding."""
    enable(model, tap=tap)
    rows = [row for row in MIXED if row[2] == 4]
    expected = [alone(model, inputs, row) for row in rows]
    loops = [made(model, inputs, *row[:3], **row[3]) for row in rows]
    before, widths = lesa.stats(model), []
    handle = model.x_embedder.register_forward_pre_hook(lambda _, a: widths.append(len(a[0])))
    for turn in range(12):
        live = [loop for loop in loops[: turn + 1] if not loop.over]
        if live:
            with lesa.Slot.batch([loop.slot for loop in live]):
                output = batched(model, live)
            for loop, velocity in zip(live, output.split(1), strict=True):
                loop.advance(velocity)
    handle.remove()
    for loop, picture in zip(loops, expected, strict=True):
        torch.testing.assert_close(loop.latent, picture, rtol=1e-4, atol=1e-5)
    after = lesa.stats(model)
    assert (after.full - before.full, after.skipped - before.skipped) == (3 + 5 + 2, 5 + 3 + 4)
    assert after.off - before.off == 7
    assert after.fallbacks == {} and {1, 2}.intersection(widths)
    assert lesa.stats(model).pool["used"] == 0


def test_rows_of_a_batch_may_lie_anywhere(model, inputs):
    """Two requests of two rows each, the guidance parts of one beside those of the other."""
    enable(model)
    loops = [made(model, inputs, seed, 8, 4) for seed in (1, 2)]
    expected = [alone(model, inputs, (seed, 8, 4, {})) for seed in (1, 2)]
    for _ in range(8):
        with lesa.Slot.batch([loop.slot for loop in loops], rows=[[0, 2], [1, 3]]):
            output = batched(model, [*loops, *loops])
        for loop, velocity in zip(loops, output[2:].split(1), strict=True):
            loop.advance(velocity)
    for loop, picture in zip(loops, expected, strict=True):
        torch.testing.assert_close(loop.latent, picture, rtol=1e-4, atol=1e-5)
    assert lesa.stats(model).fallbacks == {}


@torch.no_grad()
def test_lists_of_latents_and_prompts_in_one_batch():
    """Z-Image: where one request is forecast, the other is computed with its own prompt."""
    pipe, call = build("z-image")
    model, given = pipe.transformer, call(num_inference_steps=2)
    prompts = [*given["prompt_embeds"], *given["negative_prompt_embeds"]]
    draw = torch.Generator().manual_seed(0)
    latents = [torch.randn(4, 1, 4, 4, generator=draw) for _ in prompts]
    plain = [model([latents[1]], torch.ones(1) * t, [prompts[1]]).sample[0] for t in range(4)]
    lesa.apply_lesa_cache(model, LesaConfig(lesa.Reuse()))
    slots = [lesa.Slot(model, num_inference_steps=4, full_steps=count) for count in (1, 4)]
    for t in range(4):
        with lesa.Slot.batch(slots):
            found = model(latents, torch.ones(2) * t, prompts).sample[1]
        torch.testing.assert_close(found, plain[t], rtol=1e-4, atol=1e-5)
    stats = lesa.stats(model)
    assert (stats.full, stats.skipped, stats.fallbacks) == (5, 3, {})


class Pair(nn.Module):
    """A denoiser that returns two tensors, as models of video and sound do."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm_out = nn.LayerNorm(4)
        self.proj_out = nn.Linear(4, 4)

    def forward(self, hidden_states, timestep=None):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        hidden_states = self.proj_out(self.norm_out(hidden_states))
        return hidden_states, hidden_states.mean(-1)


@torch.no_grad()
def test_outputs_of_several_tensors_are_not_divided():
    """Such a batch of requests is computed in full, and counted."""
    model = Pair()
    latent = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    plain = model(latent)
    enable(model)
    slots = [lesa.Slot(model, num_inference_steps=6) for _ in range(2)]
    for step in range(6):
        with lesa.Slot.batch(slots):
            found = model(latent, timestep=torch.full((2,), 1.0 - step / 6))
        assert all(torch.equal(*pair) for pair in zip(found, plain, strict=True))
    stats = lesa.stats(model)
    assert (stats.full, stats.skipped) == (12, 0)
    assert any("several tensors" in reason for reason in stats.fallbacks)


def test_a_batch_that_cannot_be_is_refused(model, inputs):
    enable(model)
    loops = [made(model, inputs, seed, 8, 4) for seed in (1, 2)]
    slots = [loop.slot for loop in loops]
    for rows, told in (
        ([1], "not one entry for each of 2 slots"),
        ([0, 1], "rows=0: not a whole number >= 1"),
        ([[0], [2]], "not every row of a batch once"),
    ):
        with pytest.raises(LesaError, match=told), lesa.Slot.batch(slots, rows=rows):
            pass
    with pytest.raises(LesaError, match="one of them twice"), lesa.Slot.batch([slots[0]] * 2):
        pass
    with (
        pytest.raises(LesaError, match="rows=3: the slots have so many rows together.* has 2"),
        lesa.Slot.batch(slots, rows=[1, 2]),
    ):
        batched(model, loops)


@pytest.mark.parametrize(
    "options",
    [
        {"num_inference_steps": 10**9},
        {"num_inference_steps": "6"},
        {"sigmas": "x"},
        {"sigmas": 5},
    ],
    ids=str,
)
def test_steps_that_a_slot_cannot_have(options):
    pipe, _ = build("flux")
    lesa.enable(pipe)
    (field,) = options
    with pytest.raises(LesaError, match=f"^{field}="):
        lesa.Slot(pipe, **options)


def test_what_is_no_batch_of_slots():
    pipe, _ = build("flux")
    lesa.enable(pipe)
    slots = [lesa.Slot(pipe, num_inference_steps=6) for _ in range(2)]
    for wrong in (None, 5, slots[0], [*slots, 5]):
        with pytest.raises(LesaError, match="^slots=.*: not a list of slots; give"):
            lesa.Slot.batch(wrong)
    for rows in (5, [10**12, 1], [[], [0]], ["a", 1]):
        with pytest.raises(LesaError, match="^rows="), lesa.Slot.batch(slots, rows):
            pytest.fail("the batch began")
