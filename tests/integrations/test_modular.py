"""A modular pipeline and its guider against the classic pipeline of the same parts."""

from __future__ import annotations

import diffusers
import pytest
import torch

import lesa
from lesa.errors import LesaError
from lesa.hooks.noise_levels import noise_levels
from lesa.integrations.modular import name_branches
from tests.integrations.captured import FULL, STEPS, trained
from tests.tiny_pipelines import build, run


@pytest.fixture(scope="module")
def pair():
    """The denoising of Qwen-Image as a modular pipeline, and the classic one."""
    classic, call = build("qwen")
    step = diffusers.modular_pipelines.QwenImageAutoBlocks().sub_blocks["denoise"]
    pipe = step.init_pipeline()
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
    pipe.update_components(
        transformer=classic.transformer, scheduler=classic.scheduler, guider=guider
    )
    pipe.set_progress_bar_config(disable=True)
    size = call()["height"] // classic.vae_scale_factor * pipe.vae_scale_factor  # no VAE there

    def image():
        given = call(num_inference_steps=STEPS, height=size, width=size)
        words = {name: value for name, value in given.items() if "prompt_embeds" in name}
        more = {name: given[name] for name in ("height", "width", "generator")}
        return pipe(**words, **more, num_inference_steps=STEPS, output="latents")

    def picture():
        arguments = call(num_inference_steps=STEPS, true_cfg_scale=3.0)
        side = arguments["height"], arguments["width"], classic.vae_scale_factor
        return classic._unpack_latents(run(classic, arguments), *side)

    return classic, pipe, picture, image


def test_a_guider_names_its_calls(pair):
    classic, pipe, picture, image = pair
    plain = picture()
    torch.testing.assert_close(image(), plain, rtol=0, atol=1e-5)
    levels = noise_levels(classic.scheduler, 0, STEPS)
    forecaster = trained(levels, model="QwenImageTransformer2DModel")
    with lesa.accelerate(classic, forecaster, schedule=FULL):
        own = picture()
    lesa.enable(pipe, forecaster, schedule=FULL)
    with name_branches(pipe):
        found = [image() for _ in range(2)]
    stats = lesa.stats(pipe)
    assert (stats.full, stats.skipped, stats.fallbacks) == (2 * 2 * 3, 2 * 2 * 5, {})
    torch.testing.assert_close(found[0], own, rtol=0, atol=1e-5)
    assert torch.equal(*found)
    assert (own - plain).abs().max() > 1e-2
    image()
    assert lesa.stats(pipe).skipped == stats.skipped + 5  # without names the second call is full
    assert "branch='default#1'" in str(lesa.stats(pipe).fallbacks)
    lesa.disable(pipe)
    assert not {"prepare_models", "prepare_inputs"} & vars(pipe.guider).keys()


def test_a_call_that_breaks_off_leaves_no_name(pair, monkeypatch):
    _, pipe, _, image = pair
    lesa.enable(pipe, full_steps=3)
    first = image()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), name_branches(pipe):
        patch.setattr(
            pipe.scheduler, "step", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        image()
    assert torch.equal(image(), first)
    lesa.disable(pipe)


def test_mistakes_are_one_sentence(pair):
    classic, *_ = pair
    with pytest.raises(LesaError, match="without a guider"), name_branches(classic):
        pass
