"""Schedulers as they are published, and their odd settings: followed, or told why not."""

from __future__ import annotations

import warnings

import diffusers
import pytest
import torch
from published_schedulers import EMBEDDED, OTHERS, TINY
from tiny_pipelines import build, run

import lesa
from lesa import LesaForecaster, Reuse, Schedule, Taylor, testbed

THIRD = Schedule.fora(3)  # of six steps 0 and 3 are full


def check(pipe, arguments):
    """Full and skipped calls of one run that nothing disturbs; every step in full is plain."""
    expected = run(pipe, arguments())
    with lesa.accelerate(pipe, Taylor(1), schedule=Schedule.every(1)):
        assert torch.equal(run(pipe, arguments()), expected)
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    first = run(pipe, arguments())
    assert torch.equal(run(pipe, arguments()), first)
    found = lesa.stats(pipe)
    assert found.fallbacks == {}
    return found


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_pipeline_with_its_published_scheduler(name):
    try:
        pipe, call = build(name)
    except AttributeError as missing:  # the oldest supported diffusers has not all of them
        pytest.skip(f"diffusers {diffusers.__version__}: {missing}")
    pipe.scheduler = TINY[name].make()
    found = check(pipe, call)
    assert found.num_steps == 6 and found.skipped == 2 * found.full


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_pipeline_with_its_published_scheduler(name):
    pipe = testbed.load(name)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EMBEDDED[name].make()
    settings = testbed.settings(name) | {"num_inference_steps": 6, "output_type": "latent"}
    words = testbed.prompts(name, 1, seed=3)

    def arguments():
        return settings | {"prompt": words, "generator": torch.Generator().manual_seed(1)}

    found = check(pipe, arguments)
    assert found.num_steps == 6 and found.skipped == 2 * found.full


# Which tiny pipeline can run with which scheduler of another one, and the steps that it takes.
BORROWED = {
    "Stable Diffusion 1.5": ("sdxl", 7),
    "BLIP-Diffusion": ("sdxl", 7),
    "Playground": ("sdxl", 6),
    "Cosmos 1": ("sdxl", 6),
    "I2VGen-XL": ("sdxl", 6),
    "DeepFloyd IF": ("sdxl", 6),
    "GLIGEN": ("sdxl", 6),
    "UniDiffuser": ("sdxl", 6),
    "Dance Diffusion": ("sdxl", 6),
    "CogVideoX 5B": ("cogvideox", 6),
    "CogView3": ("cogvideox", 6),
    "Mochi": ("sd3", 6),
    "Cosmos 2": ("sd3", 6),
    "Cosmos 2.5": ("wan", 6),
    "SkyReels-V2": ("wan", 6),
    "Sana Video": ("wan", 6),
}


@pytest.mark.parametrize("name", BORROWED)
def test_a_published_scheduler_in_a_pipeline_that_takes_it(name):
    pipeline, steps = BORROWED[name]
    pipe, call = build(pipeline)
    pipe.scheduler = OTHERS[name].make()
    if name == "DeepFloyd IF":  # whose models predict a variance too
        pipe.scheduler.register_to_config(variance_type="fixed_small")
    found = check(pipe, call)
    assert found.num_steps == steps and found.skipped > found.full


# Levels that repeat, by the pipeline's own argument or by the scheduler.
REPEATED = {
    "custom sigmas": ("flux", {"sigmas": [1.0, 0.8, 0.6, 0.6, 0.4, 0.2]}, None),
    "PNDM": ("sdxl", {}, lambda: OTHERS["Stable Diffusion 1.5"].make()),
}


@pytest.mark.parametrize("tap", ["output", "hidden"])
@pytest.mark.parametrize("name", REPEATED)
def test_levels_that_repeat_cost_those_forecasters_only_that_need_levels(name, tap):
    pipeline, options, scheduler = REPEATED[name]
    pipe, call = build(pipeline)
    if scheduler is not None:
        pipe.scheduler = scheduler()
    expected = run(pipe, call(**options))
    for forecaster in (Reuse(), Taylor(2), lesa.HiCache(), lesa.FoCa(), lesa.Spectrum()):
        lesa.enable(pipe, forecaster, schedule=THIRD, tap=tap)
        first = run(pipe, call(**options))
        assert torch.equal(run(pipe, call(**options)), first)
        assert lesa.stats(pipe).fallbacks == {} and lesa.stats(pipe).skipped
    trained = LesaForecaster(branches=("cond", "uncond", "default"), tap=tap, uses_latent=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lesa.enable(pipe, trained, schedule=THIRD, tap=tap)
    assert torch.equal(run(pipe, call(**options)), expected)
    (reason,) = lesa.stats(pipe).fallbacks
    kind = type(pipe.scheduler).__name__
    assert reason == (
        f"no table: lesa goes by noise levels, and the noise levels of {kind} repeat; use another "
        "scheduler, or a forecaster that goes by steps, as lesa.Taylor()"
    )


def test_modulations_belong_to_the_times_of_their_run():
    """Two runs without levels and with other times: the hidden tap's norm goes by the times."""
    pipe, call = build("flux")
    lesa.enable(pipe, Reuse(), schedule=THIRD, tap="hidden")
    runs = [{"sigmas": [1.0, 0.8, 0.6, 0.6, 0.4, last]} for last in (0.2, 0.1)]
    one, other = (run(pipe, call(**options)) for options in runs)
    lesa.enable(pipe, Reuse(), schedule=THIRD, tap="hidden")
    assert torch.equal(run(pipe, call(**runs[1])), other)
    assert not torch.equal(one, other)
    assert lesa.stats(pipe).fallbacks == {}


def skyreels(**more):
    """SkyReels-V2 with diffusion forcing: every frame has a copy of the scheduler."""
    torch.manual_seed(0)
    transformer = diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()
    wan, call = build("wan")
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(
        None, None, transformer, wan.vae, OTHERS["SkyReels-V2"].make()
    )
    pipe.set_progress_bar_config(disable=True)
    own = {"base_num_frames": 9, "num_frames": 9, "ar_step": 0, "prompt": None}
    return pipe, lambda: call(output_type="latent") | own | more


FORCED = {  # steps of a generation, full and skipped calls of two runs
    "all frames at once": ({}, (6, 8, 16)),
    "frames one after another": ({"ar_step": 2, "causal_block_size": 1}, (10, 16, 24)),
    "a long video": ({"num_frames": 17, "overlap_history": 5}, (6, 24, 48)),
}


@pytest.mark.parametrize("name", FORCED)
def test_a_pipeline_that_steps_copies_of_its_scheduler(name):
    more, counts = FORCED[name]
    pipe, arguments = skyreels(**more)
    found = check(pipe, arguments)
    assert (found.num_steps, found.full, found.skipped) == counts


def test_frames_at_different_levels_have_none_together():
    pipe, arguments = skyreels(ar_step=2, causal_block_size=1)
    expected = run(pipe, arguments())
    lesa.enable(pipe, LesaForecaster(branches=("cond", "uncond")), schedule=THIRD)
    assert torch.equal(run(pipe, arguments()), expected)
    (reason,) = lesa.stats(pipe).fallbacks
    assert "the frames are at different noise levels" in reason
