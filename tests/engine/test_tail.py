"""The tail whose modulation is computed once per generation, against the model's own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)

import lesa
from lesa import Schedule, Taylor
from lesa.engine.tail import ModulatedTail
from lesa.hooks.attach import attach, attached, detach

FULL = Schedule.explicit([0, 1, 2, 5, 9])


@pytest.fixture
def embeddings(tiny_flux):
    """How often the time embedding ran, and with how many rows."""
    calls: list[int] = []
    tiny_flux.transformer.time_text_embed.register_forward_pre_hook(
        lambda _, args: calls.append(len(args[0]))
    )
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_second_generation_runs_no_model_on_skipped_steps(
    tiny_flux, inputs, executions, embeddings, dtype, batch
):
    tiny_flux.to(dtype)
    lesa.enable(tiny_flux, Taylor(1), schedule=FULL, tap="hidden")

    def call(**more):
        return tiny_flux(**inputs(batch=batch, dtype=dtype, **more)).images

    first = call()
    assert embeddings.count(batch) == 12
    embeddings.clear()
    counts = executions(tiny_flux.transformer)
    ran = Counter()
    tiny_flux.transformer.x_embedder.register_forward_hook(lambda *_: ran.update(["x"]))
    second = call()
    assert embeddings == [batch, 12 * batch, *[batch] * 4]  # all of them after the first full step
    assert ran["x"] == 5 == counts["transformer_blocks.0"]
    assert torch.equal(second, first)
    lesa.disable(tiny_flux)
    lesa.enable(tiny_flux, Taylor(1), schedule=FULL, tap="hidden")
    # a scale of its own makes it run the model's own tail
    own = call(joint_attention_kwargs={"scale": 1.0})
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(second, own, rtol=tolerance, atol=tolerance)
    assert not lesa.stats(tiny_flux).fallbacks


def test_another_prompt_and_guidance_are_not_those_of_the_first(tiny_flux, inputs):
    """The embedding takes the pooled prompt: its rows belong to one generation."""
    other = {"pooled_prompt_embeds": torch.randn(1, 32, generator=torch.Generator().manual_seed(9))}
    lesa.enable(tiny_flux, Taylor(1), schedule=FULL, tap="hidden")
    plain = tiny_flux(**inputs(**other)).images
    tiny_flux(**inputs())
    assert torch.equal(tiny_flux(**inputs(**other)).images, plain)


def test_the_embedding_never_runs_beside_the_model(tiny_flux, inputs):
    """Its hook would hand the batch of all steps to a thread that is noting its own call."""
    lesa.enable(tiny_flux, Taylor(1), schedule=FULL, tap="hidden")
    turn, owned = attached(tiny_flux.transformer).turn, []
    tiny_flux.transformer.time_text_embed.register_forward_pre_hook(
        lambda *_: owned.append(turn._is_owned())
    )
    tiny_flux(**inputs())
    assert len(owned) > 12 and all(owned)


def test_another_schedule_learns_its_own_times(tiny_flux, inputs, embeddings):
    lesa.enable(tiny_flux, Taylor(1), tap="hidden")
    for steps in (12, 10):
        tiny_flux(**inputs(steps=steps))
        assert embeddings.count(1) == steps
        embeddings.clear()
    tiny_flux(**inputs(steps=12))
    assert embeddings.count(1) == len(lesa.stats(tiny_flux).full_steps) == 4


def test_true_cfg_has_a_tail_per_branch(tiny_flux, inputs):
    lesa.enable(tiny_flux, Taylor(1), schedule=FULL, tap="hidden")
    first = tiny_flux(**inputs(cfg=True)).images
    second = tiny_flux(**inputs(cfg=True)).images
    assert torch.equal(second, first)


def test_a_changed_last_layer_is_used(tiny_flux, inputs):
    """An adapter replaces the module: what was found at first must not be kept."""
    lesa.enable(tiny_flux, Taylor(1), schedule=FULL, tap="hidden")
    tiny_flux(**inputs())
    zero = torch.nn.Linear(32, 4)
    torch.nn.init.zeros_(zero.weight)
    torch.nn.init.ones_(zero.bias)
    tiny_flux.transformer.proj_out = zero
    shown = []

    def look(pipe, i, t, values):
        shown.append(values["latents"].clone())
        return values

    tiny_flux(**inputs(callback_on_step_end=look))
    change = [(b - a).unique() for a, b in zip(shown, shown[1:], strict=False)]
    assert all(float(c.max() - c.min()) < 1e-5 for c in change)


def test_a_lora_scale_runs_the_models_own_tail(tiny_flux, inputs, embeddings):
    lesa.enable(tiny_flux, Taylor(1), schedule=FULL, tap="hidden")
    tiny_flux(**inputs())
    embeddings.clear()
    tiny_flux(**inputs(joint_attention_kwargs={"scale": 0.5}))
    assert embeddings.count(1) == 12


def test_autoregressive_features_enter_the_ring(tiny_flux, inputs):
    lesa.enable(tiny_flux, Autoregressive(1), schedule=FULL, tap="hidden")
    first = tiny_flux(**inputs()).images
    assert torch.equal(tiny_flux(**inputs()).images, first)


class Autoregressive(Taylor):
    """First-order extrapolation from the last two steps, predicted ones included."""

    def table(self, schedule, sigmas, branch="cond"):
        rows = torch.zeros(schedule.steps, 2, dtype=torch.float64)
        rows[list(schedule.skipped_steps)] = torch.tensor([1.5, -0.5], dtype=torch.float64)
        return lesa.Table(schedule, rows, autoregressive=True)


def qwen() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip


def flux2() -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, timestep_guidance_channels=256,
        axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip


class Idle:
    def __call__(self, denoiser, args, kwargs):
        return denoiser.run(args, kwargs).output


@pytest.mark.parametrize("make", [qwen, flux2])
def test_models_that_have_such_a_tail(make):
    model = make().eval()
    denoiser = attach(model, Idle())
    assert ModulatedTail.of(denoiser) is not None
    detach(model)
    hooks = [h for m in model.modules() for h in m._forward_pre_hooks.values()]
    assert not hooks


def test_models_that_have_another_one():
    model = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16,
        pooled_projection_dim=8, out_channels=4,
    )  # fmt: skip
    assert ModulatedTail.of(attach(model, Idle())) is None


def test_a_bare_qwen_loop_repeats_itself():
    """Its embedding is handed the features, for their dtype alone: they are not repeated."""
    torch.manual_seed(0)
    model = qwen().eval()
    scheduler = FlowMatchEulerDiscreteScheduler()

    @torch.no_grad()
    def loop():
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(0)
        draw = torch.Generator().manual_seed(1)
        x, text = torch.randn(2, 16, 16, generator=draw), torch.randn(2, 5, 16, generator=draw)
        for t in scheduler.timesteps:
            with model.cache_context("cond"):
                v = model(
                    hidden_states=x, timestep=t.expand(2) / 1000, encoder_hidden_states=text,
                    encoder_hidden_states_mask=torch.ones(2, 5).long(),
                    img_shapes=[[(1, 4, 4)]] * 2, return_dict=False,
                )[0]  # fmt: skip
            x = scheduler.step(v, t, x, return_dict=False)[0]
        return x

    config = lesa.LesaConfig(Taylor(1), schedule=Schedule.every(3), tap="hidden",
                             scheduler=scheduler)  # fmt: skip
    lesa.apply_lesa_cache(model, config)
    first = loop()
    rows = []
    model.time_text_embed.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    assert torch.equal(loop(), first)
    assert max(rows) == 16 and len(rows) < 8
