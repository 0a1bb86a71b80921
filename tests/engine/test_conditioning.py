"""What changes a trajectory's conditioning, wherever in the arguments it lies."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from tiny_pipelines import build, run
from torch import nn
from user_checks import at_step, check_nothing_stale, new_fallbacks

import lesa
from lesa import LesaConfig, Schedule, Taylor

THIRD = Schedule.fora(3)  # of six steps 0 and 3 are full


class Denoiser(nn.Module):
    """A class without a row, whose prompt may come in any shape."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm_out = nn.LayerNorm(4)
        self.proj_out = nn.Linear(4, 4)

    def forward(self, hidden_states, words=None, extra=None, timestep=None, residuals=None):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        hidden_states = self.norm_out(hidden_states)
        return self.proj_out(hidden_states)


def draw():
    return torch.randn(1, 3, 4)


# A prompt, and what changes it.
NESTED = {
    "a list": (lambda: [draw(), draw()], lambda p: p.__setitem__(1, draw())),
    "a list, in place": (lambda: [draw(), draw()], lambda p: p[0].mul_(2)),
    "a list, longer": (lambda: [draw()], lambda p: p.append(draw())),
    "a list, shorter": (lambda: [draw(), draw()], lambda p: p.pop()),
    "lists in a list": (lambda: [[draw()], [draw()]], lambda p: p[1].__setitem__(0, draw())),
    "a tuple in a dict": (lambda: {"a": (draw(), 2)}, lambda p: p["a"][0].add_(1)),
    "a dict in a list": (lambda: [{"a": draw()}], lambda p: p[0].update(a=draw())),
    "a number in a dict": (lambda: {"scale": 0.5}, lambda p: p.update(scale=0.7)),
    "a number beside tensors": (lambda: [draw(), 0.5], lambda p: p.__setitem__(1, 0.7)),
}


@torch.no_grad()
def loop(
    model,
    words,
    change=None,
    positional=False,
    steps=6,
    copied=False,
    residuals=False,
    remade=False,
):
    """The reasons of full steps in one run; `change(words)` after step 0."""
    before = dict(lesa.stats(model).fallbacks)
    latent = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(1))
    for index in range(steps):
        given = type(words)(words) if copied else words  # another container, the same parts
        given = copy.deepcopy(given) if remade else given
        more = {"timestep": torch.tensor([1.0 - index / steps])}
        if residuals:
            more["residuals"] = [draw(), draw()]
        if positional:
            latent = latent - model(latent, given, **more) / steps
        else:
            latent = latent - model(hidden_states=latent, words=given, **more) / steps
        if index == 0 and change is not None:
            change(words)
    after = lesa.stats(model).fallbacks
    return {why: n - before.get(why, 0) for why, n in after.items() if n > before.get(why, 0)}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Denoiser().eval()
    lesa.apply_lesa_cache(model, LesaConfig(Taylor(1), schedule=THIRD, num_inference_steps=6))
    return model


@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("name", NESTED)
def test_what_lies_in_lists_tuples_and_dicts_is_watched(model, name, positional):
    make, change = NESTED[name]
    assert loop(model, make(), positional=positional) == {}
    (reason,) = loop(model, make(), change, positional=positional)
    assert reason.startswith("words") and "changed" in reason
    assert loop(model, make(), positional=positional) == {}


def test_a_new_list_of_the_same_tensors_is_the_same_prompt(model):
    """As Z-Image makes one at every step."""
    assert loop(model, [draw(), draw()], copied=True) == {}
    assert lesa.stats(model).skipped == 4


def test_a_prompt_that_is_made_anew_at_every_step(model):
    """As AceStep and the first latent diffusion do: known from the second step on, for good."""
    words = [draw(), {"a": draw()}]
    assert loop(model, words, remade=True) == {"words changed": 1}
    for _ in range(2):
        assert loop(model, words, remade=True) == {}
    assert loop(model, words, lambda w: w[0].mul_(2), remade=True) == {"words changed": 1}
    assert loop(model, words, lambda w: w[0].mul_(2)) == {"words changed": 1}  # in place
    assert loop(model, words, lambda w: w[1].update(a=w[1]["a"].double())) != {}
    assert loop(model, words, remade=True) == loop(model, words) == {}


def test_what_a_pipeline_makes_anew_at_every_step_is_no_prompt(model):
    """The residuals of a ControlNet."""
    assert loop(model, [draw()], residuals=True) == {}
    assert lesa.stats(model).skipped == 4


def test_nothing_that_is_watched_is_kept_alive(model):
    words = [draw(), {"a": draw()}]
    loop(model, words, steps=2)
    held = [part.untyped_storage().data_ptr() for part in (words[0], words[1]["a"])]
    del words
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    dense = [each for each in tensors if each.layout is torch.strided]  # sparse have no storage
    alive = {each.untyped_storage().data_ptr() for each in dense}
    assert not alive.intersection(held)


@pytest.mark.parametrize("in_place", [False, True], ids=["new tensors", "in place"])
@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_a_callback_rewrites_the_prompts_of_z_image(tap, in_place, monkeypatch):
    pipe, call = build("z-image")
    monkeypatch.setattr(type(pipe), "_callback_tensor_inputs", ["latents", "prompt_embeds"])
    lesa.enable(pipe, Taylor(1), schedule=THIRD, tap=tap)
    first = run(pipe, call())

    def change(_, values):
        prompts = values["prompt_embeds"]
        if in_place:
            for part in prompts:
                part.mul_(-2)
        return {"prompt_embeds": prompts if in_place else [part * -2 for part in prompts]}

    rewritten = call(
        callback_on_step_end=at_step(0, change),
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    rewritten["prompt_embeds"] = [part.clone() for part in rewritten["prompt_embeds"]]
    assert new_fallbacks(pipe, rewritten) == {"cap_feats changed": 1}
    assert torch.equal(check_nothing_stale(pipe, call), first)


class Latent:
    """Half the current latent and half of the last output."""

    name, uses_latent, tap = "latent", True, "output"

    def history(self, schedule):
        return 1

    def table(self, schedule, sigmas, branch="cond"):
        rows = torch.zeros(schedule.steps, 2, dtype=torch.float64)
        rows[list(schedule.skipped_steps)] = 0.5
        return lesa.Table(schedule, rows, uses_latent=True)


@pytest.mark.parametrize("forecaster", [Taylor(1), Latent()], ids=lambda f: f.name)
@pytest.mark.parametrize("name", ["flux", "sdxl", "sd3"])
def test_autocast_costs_no_full_step(name, forecaster):
    """Its first output turns the latents, which begin in fp32, into bf16."""
    pipe, call = build(name)
    lesa.enable(pipe, forecaster, schedule=THIRD, tap="output")
    with torch.autocast("cpu", torch.bfloat16):
        first = run(pipe, call())
        assert torch.equal(run(pipe, call()), first)
    found = lesa.stats(pipe)
    assert found.skipped == 2 * found.full and found.fallbacks == {}


def test_a_latent_of_another_dtype_without_autocast_is_computed_in_full():
    pipe, call = build("sdxl")
    lesa.enable(pipe, Taylor(1), schedule=THIRD)

    def change(pipe, values):
        pipe.unet.to(torch.float64)
        return {name: value.double() for name, value in values.items()}

    names = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    reasons = new_fallbacks(
        pipe,
        call(callback_on_step_end=at_step(0, change), callback_on_step_end_tensor_inputs=names),
    )
    assert "latent changed in shape, dtype or device" in reasons
