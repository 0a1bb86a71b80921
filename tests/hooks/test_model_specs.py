"""Every pipeline of the paper, and every other denoiser class that has a row."""

from __future__ import annotations

import contextlib
import json

import diffusers
import pytest
import tiny_models
import tiny_pipelines
import torch
from model_checks import (
    ReuseFromSecond,
    check_full_steps_are_plain,
    check_reuse_is_exact,
    check_skips,
    first_call,
)
from torch import nn
from typer.testing import CliRunner

import lesa
from lesa.cli import app
from lesa.cli.inputs import load_pipeline
from lesa.hooks.attach import attach
from lesa.hooks.model_specs import known_models, model_spec
from lesa.hooks.spec_discovery import Unclear, read_structure

SHIPPED = known_models()


@pytest.fixture(params=list(tiny_pipelines.ROWS))
def built(request):
    try:
        return tiny_pipelines.build(request.param)
    except AttributeError as missing:  # the oldest supported diffusers has not all of them
        pytest.skip(f"diffusers {diffusers.__version__}: {missing}")


def test_a_skipped_call_by_reuse_is_the_full_one_without_its_blocks(built):
    pipe, call = built
    args, kwargs = first_call(pipe, call(num_inference_steps=2))
    check_reuse_is_exact(lesa.api.find_denoiser(pipe), args, kwargs)


def test_every_step_in_full_is_the_plain_run_and_off_leaves_no_trace(built):
    check_full_steps_are_plain(*built)


def test_blocks_run_on_the_full_steps_only(built):
    pipe, call = built
    for tap in model_spec(lesa.api.find_denoiser(pipe)).taps:
        check_skips(pipe, call, tap)


@pytest.mark.parametrize("name", list(tiny_pipelines.IMG2IMG))
def test_a_run_from_a_picture_counts_its_own_steps(name):
    if not hasattr(diffusers, tiny_pipelines.IMG2IMG[name][0]):
        pytest.skip(f"diffusers {diffusers.__version__} has no such pipeline")
    pipe, call = tiny_pipelines.build_img2img(name)
    check_skips(pipe, call, "hidden")


def test_under_context_parallelism_a_rank_injects_its_shard():
    """Wan and Qwen-Image split the tokens in front of the first block, gather after `proj_out`."""
    pipe, call = tiny_pipelines.build("wan")
    args, kwargs = first_call(pipe, call(num_inference_steps=2))
    model, controller = pipe.transformer, ReuseFromSecond()
    attach(model, controller)
    with torch.no_grad():
        expected = model(*args, **kwargs)[0]
        controller.feature = controller.feature[:, : controller.feature.shape[1] // 2]
        model.proj_out.register_forward_hook(lambda _, args, out: torch.cat([out, out], dim=1))
        assert model(*args, **kwargs) is None
        model._parallel_config = object()
        found = model(*args, **kwargs)[0]
    assert torch.equal(found[:, :, 0], expected[:, :, 0])


@pytest.mark.parametrize("name", list(tiny_models.ROWS))
def test_other_classes_are_as_their_rows_say(name):
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    model, arguments = tiny_models.build(name)
    check_reuse_is_exact(model, (), arguments)


def test_every_row_is_checked_above():
    checked = set(tiny_models.ROWS)
    for name in tiny_pipelines.ROWS:
        with contextlib.suppress(AttributeError):
            checked.add(type(lesa.api.find_denoiser(tiny_pipelines.build(name)[0])).__name__)
    unchecked = {name for name in SHIPPED if hasattr(diffusers, name)} - checked
    assert not unchecked


def test_what_is_read_from_a_forward_is_what_its_row_says():
    agreed = set()
    for name in filter(lambda name: hasattr(diffusers, name), tiny_models.ROWS):
        model, _ = tiny_models.build(name)
        with contextlib.suppress(Unclear):
            blocks, tail, _ = read_structure(model)
            assert (set(blocks), tail) <= (set(SHIPPED[name].blocks), SHIPPED[name].tail), name
            agreed.add(name)
    assert agreed >= {"MochiTransformer3DModel", "OvisImageTransformer2DModel"}


class Denoiser(nn.Module):
    """A class without a row, whose forward can be read."""

    def __init__(self, blocks=2):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(blocks))
        self.norm_out = nn.LayerNorm(4)
        self.proj_out = nn.Linear(4, 4)

    def forward(self, hidden_states, encoder_hidden_states=None, timestep=None):
        context = encoder_hidden_states
        for block in self.blocks:
            hidden_states = block(hidden_states + context)
        hidden_states = hidden_states[:, :3]
        hidden_states = self.norm_out(hidden_states)
        return self.proj_out(hidden_states)


class Leaking(Denoiser):
    def forward(self, hidden_states, encoder_hidden_states=None, timestep=None):
        first = hidden_states
        for block in self.blocks:
            first = block(first)
        hidden_states = self.norm_out(first)
        return self.proj_out(hidden_states) + first


class Collecting(Denoiser):
    def forward(self, hidden_states, encoder_hidden_states=None, timestep=None):
        seen = []
        for block in self.blocks:
            hidden_states = block(hidden_states)
            seen.append(hidden_states)
        hidden_states = self.norm_out(hidden_states)
        return self.proj_out(hidden_states + seen[0])


class Renaming(Denoiser):
    def forward(self, hidden_states, encoder_hidden_states=None, timestep=None):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        copy = hidden_states * 2
        hidden_states = self.norm_out(hidden_states)
        return self.proj_out(hidden_states) + copy


class Indexing(Denoiser):
    def forward(self, hidden_states, encoder_hidden_states=None, timestep=None):
        for i, _ in enumerate(self.blocks):
            hidden_states = self.blocks[i](hidden_states)
        hidden_states = self.norm_out(hidden_states)
        return self.proj_out(hidden_states)


class Branching(Denoiser):
    def __init__(self):
        super().__init__()
        self.audio_blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))


def test_a_class_without_a_row_is_read_from_its_forward():
    spec = model_spec(Denoiser())
    assert spec.blocks == ("blocks",) and spec.tail == "norm_out"
    assert spec.conditioning == ("encoder_hidden_states",)
    call = {"hidden_states": torch.randn(1, 5, 4), "encoder_hidden_states": torch.randn(1, 5, 4)}
    check_reuse_is_exact(Denoiser(), (), call)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Leaking(), "through norm_out alone"),
        (Collecting(), "through norm_out alone"),
        (Renaming(), "through norm_out alone"),
        (Indexing(), "simply loop over blocks"),
        (Branching(), "audio_blocks"),
        (Denoiser(blocks=1), "no two blocks"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_class_that_cannot_be_relied_on_has_the_output_tap_alone(model, reason):
    spec = model_spec(model)
    assert spec.taps == ("output",) and reason in spec.notes
    assert (spec.latent, spec.conditioning) == ("hidden_states", ("encoder_hidden_states",))
    loop = {"num_inference_steps": 4, "schedule": lesa.Schedule.explicit([0, 2])}
    with pytest.raises(lesa.LesaError, match=f"tap='hidden'.*{reason}.*use 'output'"):
        lesa.apply_lesa_cache(model, lesa.LesaConfig(lesa.Reuse(), tap="hidden", **loop))
    lesa.apply_lesa_cache(model, lesa.LesaConfig(lesa.Reuse(), **loop))
    prompt, found = torch.randn(1, 3, 4), []
    with torch.no_grad():
        found = [model(torch.randn(1, 3, 4), prompt, torch.tensor(step)) for step in range(4)]
    assert torch.equal(found[1], found[0]) and torch.equal(found[3], found[2])
    assert lesa.stats(model).skipped == 2


class Bare(nn.Module):
    def forward(self, *inputs):
        return inputs[0]


@pytest.mark.parametrize(
    ("model", "remedy"),
    [(Bare(), "whose forward"), (object(), "give a pipeline"), ("flux", "give a pipeline")],
)
def test_what_names_no_latent_is_refused_with_the_remedy(model, remedy):
    with pytest.raises(lesa.LesaError, match=remedy):
        model_spec(model)


def test_a_call_that_fills_a_cache_is_never_skipped():
    class Caching(nn.Module):
        def forward(self, x, t, kv_cache=None, kv_cache_mode=None):
            if kv_cache_mode == "extract":
                kv_cache.append(t)
            return x * 2

    model, filled = Caching(), []
    every = {"num_inference_steps": 6, "schedule": lesa.Schedule.explicit([0, 3])}
    lesa.apply_lesa_cache(model, lesa.LesaConfig(lesa.Reuse(), **every))
    with torch.no_grad():
        for mode, skipped in (("extract", 0), ("cached", 4), (None, 8)):
            for step in range(6):
                cache = None if mode is None else filled
                model(torch.ones(1, 2), torch.tensor(6 - step), cache, kv_cache_mode=mode)
            assert lesa.stats(model).skipped == skipped, mode
    assert len(filled) == 6
    assert lesa.stats(model).fallbacks["the model writes to kv_cache in this call"] == 6


def test_a_tap_that_a_model_does_not_have_is_refused():
    model = diffusers.UNet2DModel(
        block_out_channels=(4,), norm_num_groups=1, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    loop = {"num_inference_steps": 4, "schedule": lesa.Schedule.every(2)}
    with pytest.raises(lesa.LesaError, match="tap='hidden'.*use 'output'"):
        lesa.apply_lesa_cache(model, lesa.LesaConfig(lesa.Reuse(), tap="hidden", **loop))
    lesa.apply_lesa_cache(model, lesa.LesaConfig(lesa.Reuse(), **loop))
    assert lesa.stats(model).tap == "output"


def test_a_saved_pipeline_is_loaded_in_the_wanted_dtype(tmp_path):
    tiny_pipelines.build("dit")[0].save_pretrained(tmp_path)  # which has all of its parts
    pipe = load_pipeline(str(tmp_path), device="cpu", dtype="bfloat16")
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16


def test_the_rows_are_listed_for_people_and_for_programs():
    shown = CliRunner().invoke(app, ["env", "--models"], env={"COLUMNS": "300"})
    assert shown.exit_code == 0
    listed = json.loads(CliRunner().invoke(app, ["env", "--models", "--json"]).stdout)
    rows = {row["class"]: row for row in listed}
    assert set(rows) >= set(SHIPPED) and all(name in shown.stdout for name in SHIPPED)
    assert rows["CogVideoXTransformer3DModel"]["tail"] == "norm_final"
    assert rows["FluxTransformer2DModel"]["cache_mixin"] is True
    assert rows["SD3Transformer2DModel"]["cache_mixin"] is False
