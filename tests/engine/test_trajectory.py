"""How long a generation's features live: not into the decoding, nor past a run that broke off."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tiny_pipelines import build

import lesa
from lesa import Schedule, Taylor
from lesa.engine.controller import CacheController
from lesa.engine.ring import Ring

FULL = Schedule.explicit([0, 1, 3])
LAST_SKIPPED = 4  # of 6 steps, of which the last one is full as well
PLANNED = Schedule.explicit([0, 1, 3, 5])


class Rings(list):
    """Weak references to the memory of all rings that were made."""

    def alive(self):
        return sum(data() is not None for data in self)


@pytest.fixture
def rings(monkeypatch):
    """Without the garbage collector: a cycle would hold the memory for an unknown time."""
    found, init = Rings(), Ring.__init__

    def watched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        found.append(weakref.ref(self.data))

    monkeypatch.setattr(Ring, "__init__", watched)
    gc.collect()
    gc.disable()
    yield found
    gc.enable()


def at_each_step(note):
    """A callback in the form that every pipeline takes."""

    def callback(pipe, index, time, values):
        note(index)
        return values

    return {"callback_on_step_end": callback}


@pytest.mark.parametrize("tap", ["output", "hidden"])
@pytest.mark.parametrize("name", ["flux", "qwen", "wan", "sdxl"])
def test_the_ring_is_gone_before_the_decoding(name, tap, rings, monkeypatch):
    pipe, call = build(name)
    lesa.enable(pipe, Taylor(1), schedule=PLANNED, tap=tap)
    alive, decoding, decode = [], [], pipe.vae.decode

    def watched(*args, **kwargs):
        decoding.append(rings.alive())
        return decode(*args, **kwargs)

    monkeypatch.setattr(pipe.vae, "decode", watched)
    output = "np" if name == "wan" else "pt"
    note = at_each_step(lambda index: alive.append(rings.alive()))
    pipe(**call(output_type=output, **note))
    branches = len(rings)
    assert alive == [*[branches] * LAST_SKIPPED, 0, 0] and branches > 0
    assert decoding and not any(decoding)
    assert not lesa.stats(pipe).fallbacks and lesa.stats(pipe).skipped == 2 * branches


@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_a_second_run_is_what_the_first_was(tap):
    pipe, call = build("qwen")
    lesa.enable(pipe, Taylor(1), schedule=PLANNED, tap=tap)
    first, second = (pipe(**call()).images for _ in range(2))
    assert torch.equal(first, second)


def broken_off(pipe, arguments, error):
    """Runs it up to an error in the callback after a step with features; the traceback is gone."""

    def stop(index):
        if index == 2:
            raise error

    try:
        pipe(**arguments, **at_each_step(stop))
    except error:
        return True
    return False


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("tap", ["output", "hidden"])
@pytest.mark.parametrize("name", ["flux", "qwen", "wan", "sdxl"])
def test_a_run_that_broke_off_leaves_no_ring(name, tap, error, rings):
    pipe, call = build(name)
    lesa.enable(pipe, Taylor(1), schedule=FULL, tap=tap)
    assert broken_off(pipe, call(), error)
    assert rings and not rings.alive()


@pytest.mark.parametrize("name", ["flux", "qwen", "sdxl"])
def test_nor_does_one_whose_embeddings_the_user_keeps(name, rings):
    pipe, call = build(name)
    lesa.enable(pipe, Taylor(1), schedule=FULL)
    kept = call()
    assert broken_off(pipe, kept, ValueError)
    assert rings and not rings.alive()


def test_an_interrupt_within_a_skipped_step_leaves_no_ring(rings, monkeypatch):
    pipe, call = build("wan")  # all that it conditions on is the user's
    lesa.enable(pipe, Taylor(1), schedule=FULL)
    kept, trajectories = call(), []

    def interrupted(self, *args):
        trajectories.append(rings.alive())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lesa.engine.mixer.Mixer.__call__", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            pipe(**kept)
    del caught
    assert trajectories == [2] and not rings.alive()
    assert not lesa.stats(pipe).fallbacks


def test_positions_made_anew_at_every_step_are_not_taken_for_the_end(rings):
    """A loop of one's own may build its position tensors inside."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe, call = build("flux")
    model, arguments = pipe.transformer, call()
    scheduler = FlowMatchEulerDiscreteScheduler()
    lesa.apply_lesa_cache(model, lesa.LesaConfig(Taylor(1), schedule=FULL, scheduler=scheduler))
    scheduler.set_timesteps(6)
    latents = torch.randn(1, 16, model.config.in_channels)
    text = arguments["prompt_embeds"]
    with torch.no_grad():
        for time in scheduler.timesteps:
            noise = model(
                hidden_states=latents,
                timestep=time.expand(1) / 1000,
                encoder_hidden_states=text,
                pooled_projections=arguments["pooled_prompt_embeds"],
                img_ids=torch.zeros(16, 3),
                txt_ids=torch.zeros(text.shape[1], 3),
                guidance=torch.ones(1) if model.config.guidance_embeds else None,
                return_dict=False,
            )[0]
            latents = scheduler.step(noise, time, latents, return_dict=False)[0]
    controller = model._lesa_denoiser.controller
    assert isinstance(controller, CacheController)
    counts = controller.stats()
    assert (counts.full, counts.skipped, counts.fallbacks) == (3, 3, {})
