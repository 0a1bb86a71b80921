"""`--scheduler`: another sampler on the pipelines of diffusers, by name."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lesa import testbed
from lesa.cli import app
from lesa.cli.rehearsal import rehearse
from lesa.cli.schedulers import CLASSES, set_scheduler
from lesa.errors import LesaError
from lesa.hooks.noise_levels import noise_levels
from lesa.hooks.timed_run import generate

STEPS = 8


def picture(embedded: str, name: str | None) -> torch.Tensor:
    pipe = testbed.load(embedded)
    if name is not None:
        set_scheduler(pipe, name)
        assert type(pipe.scheduler).__name__ == CLASSES[name]
    settings = testbed.settings(embedded) | {"num_inference_steps": STEPS}
    return generate(pipe, testbed.prompts(embedded, 1, seed=3), [0], settings).images


@pytest.mark.parametrize(
    ("embedded", "names"),
    [
        ("flux", ("flow-euler", "dpm++", "unipc")),  # with a shift that depends on the size
        ("sdxl", ("euler", "ddim", "dpm++", "unipc")),
    ],
)
def test_every_sampler_draws_the_same_picture(embedded, names):
    """To the error of 8 steps: a wrong shift or parametrisation leaves noise, under 15 dB."""
    own = picture(embedded, None)
    for name in names:
        error = float((picture(embedded, name) - own).square().mean())
        decibels = -10 * torch.tensor(error).clamp_min(1e-12).log10()
        assert decibels > (100 if name in ("flow-euler", "euler") else 25), (name, decibels)


def test_a_static_shift_is_kept():
    """HunyuanVideo and Wan call it differently: shift and flow_shift."""
    pipe = testbed.load("hunyuan")

    def levels() -> torch.Tensor:
        pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8))
        return torch.tensor(noise_levels(pipe.scheduler, 0, 8))

    own = levels()
    for name in ("unipc", "flow-euler"):
        set_scheduler(pipe, name)
        torch.testing.assert_close(levels(), own, atol=1e-5, rtol=0)  # UniPC begins at 1 - 1e-6


def test_ddim_does_not_clip_latents_where_the_config_says_nothing():
    pipe = testbed.load("sdxl")
    pipe.scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
    set_scheduler(pipe, "ddim")
    assert pipe.scheduler.config.clip_sample is False
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=True)
    set_scheduler(pipe, "ddim")
    assert pipe.scheduler.config.clip_sample is True


@pytest.mark.parametrize(
    ("own", "name", "words"),
    [
        (diffusers.DDIMScheduler(), "flow-euler", "choose from ddim, euler, dpm.., unipc"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "euler", "choose from flow-euler, dpm.., u"),
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), "ddim", "of flow matching, wh"),
        (diffusers.EDMEulerScheduler(), "euler", "EDMEulerScheduler cannot be replaced by anoth"),
        (diffusers.DDIMScheduler(), "heun", "scheduler='heun': unknown; choose from ddim"),
    ],
)
def test_samplers_that_do_not_fit(own, name, words):
    pipe = testbed.load("sdxl")
    pipe.scheduler = own
    with pytest.raises(LesaError, match=words):
        set_scheduler(pipe, name)
    assert pipe.scheduler is own


def test_a_pipeline_that_cannot_run_with_a_sampler_says_so_before_its_first_step():
    pipe, steps = testbed.load("qwen"), []
    pipe.transformer.register_forward_pre_hook(lambda *_: steps.append(1))
    set_scheduler(pipe, "dpm++")
    with pytest.raises(LesaError, match="^scheduler='dpm..': QwenImagePipeline cannot run with"):
        rehearse(pipe, ["a"], testbed.settings("qwen"), "dpm++")
    assert not steps


def test_train_records_the_sampler_and_generate_takes_it(tmp_path):
    """Without --scheduler, since a forecaster belongs to its sampler."""

    def run(*args: object) -> dict:
        facts = tmp_path / "facts.json"
        result = CliRunner().invoke(app, [str(arg) for arg in (*args, "--json", facts)])
        assert result.exit_code == 0, result.output
        return json.loads(facts.read_text())

    texts, out = tmp_path / "p.txt", tmp_path / "forecaster"
    texts.write_text("\n".join(testbed.captions(1, seed=1, split="train")))
    few = ("--num-inference-steps", 8, "--full-steps", 4, "--polish", 0)
    trained = run("train", "flux", "--prompts", texts, *few, "--scheduler", "unipc", "--out", out)
    assert trained["metadata"]["scheduler"] == "UniPCMultistepScheduler"
    made = run("generate", "flux", "--prompts", texts, "--forecaster", out, "--out", tmp_path / "o")
    assert made["scheduler"] == "UniPCMultistepScheduler"
    assert made["stats"]["full"] == 4 and made["stats"]["skipped"] == 4
    assert not made["stats"]["fallbacks"]
    options = ("--prompts", texts, "--methods", "lesa", "--forecaster", out, "--full-steps", 4)
    rows = run("compare", "flux", *options, "--scheduler", "unipc")["rows"]
    assert rows[0]["full_steps"] == 4
