"""Which modules of a pipeline are its denoisers, in wrappers and under any name."""

from __future__ import annotations

import diffusers
import pytest
import torch
from tiny_pipelines import build, draw
from torch import nn

import lesa
from lesa.hooks.pipeline import component_name, find_denoiser, find_denoisers
from lesa.hooks.wrappers import core_of

THIRD = lesa.Schedule.fora(3)  # of six steps 0 and 3 are full


def tiny_unet():
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(4, 8),
        norm_num_groups=2, layers_per_block=1, cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


class TwoUNets(diffusers.DiffusionPipeline):
    """Denoises with two modules, neither of which has the usual name, and has a decoder."""

    def __init__(self, scheduler, image_part, critic, decoder, control=None):
        super().__init__()
        self.register_modules(
            scheduler=scheduler,
            image_part=image_part,
            critic=critic,
            decoder=decoder,
            control=control,
        )

    @torch.no_grad()
    def __call__(self, steps, latent, prompt):
        self.scheduler.set_timesteps(steps)
        for time in self.scheduler.timesteps:
            first = self.image_part(latent, time, encoder_hidden_states=prompt)[0]
            second = self.critic(latent, time, encoder_hidden_states=prompt)[0]
            latent = self.scheduler.step(first - 0.5 * second, time, latent)[0]
        return latent


def two_unets():
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=1)
    control = diffusers.ControlNetModel.from_unet(tiny_unet())
    return TwoUNets(diffusers.EulerDiscreteScheduler(), tiny_unet(), tiny_unet(), vae, control)


def test_denoisers_under_other_names_are_found_and_skipped():
    pipe = two_unets()
    assert find_denoisers(pipe) == [pipe.image_part, pipe.critic]
    assert component_name(pipe, pipe.critic) == "critic"
    ran = []
    for model in find_denoisers(pipe):
        model.mid_block.register_forward_hook(lambda *_: ran.append(1))
    lesa.enable(pipe, lesa.Taylor(1), schedule=THIRD)
    pipe(6, draw(1, 4, 8, 8), draw(1, 3, 8))
    stats = lesa.stats(pipe)
    assert (stats.full, stats.skipped, stats.fallbacks) == (4, 8, {}) and len(ran) == 4
    lesa.disable(pipe)
    assert not any(map(lesa.hooks.attach.attached, find_denoisers(pipe)))


def test_a_denoiser_that_the_forecaster_does_not_serve_is_named():
    pipe = two_unets()
    pipe.register_modules(critic=build("flux")[0].transformer)
    trained = lesa.LesaForecaster("table", metadata={"model_class": "UNet2DConditionModel"})
    lesa.enable(pipe, lesa.Taylor(1), schedule=THIRD)
    with pytest.warns(UserWarning, match="critic is not accelerated: .*FluxTransformer2DModel"):
        lesa.enable(pipe, trained, schedule=THIRD)
    assert list(lesa.stats(pipe).left_out) == ["critic"] and "critic" in str(lesa.stats(pipe))
    assert not lesa.hooks.attach.attached(pipe.critic)  # which the first call had accelerated
    other = lesa.LesaForecaster("table", metadata={"model_class": "WanTransformer3DModel"})
    with pytest.raises(lesa.LesaError, match="WanTransformer3DModel"):
        lesa.enable(pipe, other, schedule=THIRD)
    assert lesa.stats(pipe).forecaster == trained.name


def test_a_pipeline_without_a_denoiser_is_told():
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=1)

    class Nothing(diffusers.DiffusionPipeline):
        def __init__(self, vae):
            super().__init__()
            self.register_modules(vae=vae)

    with pytest.raises(lesa.LesaError, match="Nothing has no denoiser"):
        find_denoiser(Nothing(vae))


def test_a_class_instead_of_a_pipeline_is_told():
    with pytest.raises(lesa.LesaError, match="pipe=FluxPipeline: a class, not a pipeline"):
        lesa.enable(diffusers.FluxPipeline)


def in_peft(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["to_q"]))


def in_both(model):
    return in_peft(torch.compile(model, backend="eager"))


@pytest.mark.parametrize("wrap", [nn.DataParallel, in_peft, in_both])
def test_wrappers_are_looked_through(wrap):
    pipe, _ = build("flux")
    model = pipe.transformer
    wrapped = wrap(model)
    assert core_of(wrapped) is model
    arguments = dict(
        hidden_states=draw(1, 4, model.config.in_channels),
        encoder_hidden_states=draw(1, 3, model.config.joint_attention_dim),
        pooled_projections=draw(1, model.config.pooled_projection_dim),
        timestep=torch.tensor([1.0]),
        guidance=torch.tensor([3.5]),
        img_ids=torch.zeros(4, 3),
        txt_ids=torch.zeros(3, 3),
        return_dict=False,
    )
    ran = []
    model.norm_out.register_forward_hook(lambda *_: ran.append(1))
    config = lesa.LesaConfig(lesa.Taylor(1), num_inference_steps=6, schedule=THIRD)
    lesa.apply_lesa_cache(wrapped, config)
    with torch.no_grad():
        for _ in range(6):
            wrapped(**arguments)
    assert lesa.stats(wrapped).skipped == 4 and len(ran) == 2
    lesa.remove_lesa_cache(wrapped)
    assert core_of(wrapped) is model


def test_several_tensors_are_forecast_together():
    """LTX-2 returns video and sound, in one tuple or one output object."""
    if not hasattr(diffusers, "LTX2VideoTransformer3DModel"):
        pytest.skip(f"diffusers {diffusers.__version__} has no LTX-2")

    class Two(nn.Module):
        def forward(self, hidden_states, audio_hidden_states, timestep, return_dict=True):
            from diffusers.models.transformers.transformer_ltx2 import AudioVisualModelOutput

            video, sound = hidden_states * timestep, audio_hidden_states * (timestep + 1)
            if not return_dict:
                return video, sound
            return AudioVisualModelOutput(sample=video, audio_sample=sound)

    model, video, sound = Two(), draw(2, 5, 3), draw(2, 7, 4)
    config = lesa.LesaConfig(
        lesa.Taylor(1), num_inference_steps=4, schedule=lesa.Schedule.explicit([0, 1])
    )
    for kind in (True, False):
        lesa.apply_lesa_cache(model, config)
        with torch.no_grad():
            found = [
                model(video, sound, torch.tensor(4.0 - step), return_dict=kind) for step in range(4)
            ]
        assert lesa.stats(model).skipped == 2 and not lesa.stats(model).fallbacks
        assert type(found[3]) is type(found[0])
        line = found[3].sample if kind else found[3][0], found[3][-1 if not kind else 1]
        # both are linear in the time, and so is the forecast
        torch.testing.assert_close(line[0], video * 1.0)
        torch.testing.assert_close(line[1], sound * 2.0)
