"""Attaching leaves the model what it was; skipping really skips."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref

import diffusers
import pytest
import torch
from torch import nn

import lesa
from lesa.errors import LesaError
from lesa.hooks.attach import attach, attached, detach
from lesa.hooks.model_specs import ModelSpec, known_models, model_spec, register_model
from lesa.hooks.outputs import kind_of, make_output, read_sample


def plain(denoiser, args, kwargs):
    return denoiser.run(args, kwargs)[0]


class ReuseFromSecond:
    """Runs the first call and injects its feature into all later ones."""

    feature = None

    def __call__(self, denoiser, args, kwargs):
        if self.feature is None:
            output, self.feature, _ = denoiser.run(args, kwargs, tap=True)
            return output
        return denoiser.run_tail(self.feature, args, kwargs).output


def flux_call(model, length=16, **more):
    draw = torch.Generator().manual_seed(0)
    call = {
        "hidden_states": torch.randn(1, length, 4, generator=draw),
        "encoder_hidden_states": torch.randn(1, 6, 32, generator=draw),
        "pooled_projections": torch.randn(1, 32, generator=draw),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(length, 3),
        "txt_ids": torch.zeros(6, 3),
    }
    with torch.no_grad():
        return model(**call | more)


def fingerprint(model):
    """Everything that attach touches."""
    return {
        name: (type(part), set(vars(part)), len(part._forward_pre_hooks), type(part).__call__)
        for name, part in model.named_modules()
    } | {"keys": list(model.state_dict()), "forward": model.forward.__func__}


def test_detach_restores_everything(tiny_flux):
    model = tiny_flux.transformer
    before, output = fingerprint(model), flux_call(model).sample
    attach(model, plain, tiny_flux)
    assert fingerprint(model) != before
    assert list(model.state_dict()) == before["keys"]
    assert torch.equal(flux_call(model).sample, output)
    detach(model)
    assert fingerprint(model) == before
    assert type(model) is diffusers.FluxTransformer2DModel
    assert type(model.transformer_blocks) is nn.ModuleList
    assert attached(model) is None and not model.is_cache_enabled
    assert torch.equal(flux_call(model).sample, output)
    detach(model)  # twice is harmless


def test_the_attached_model_passes_for_its_own_class(tiny_flux):
    model = tiny_flux.transformer
    attach(model, plain, tiny_flux)
    assert isinstance(model, diffusers.FluxTransformer2DModel)
    assert type(model) in (diffusers.FluxTransformer2DModel,)
    assert type(model).__name__ == "FluxTransformer2DModel"
    assert "hidden_states" in inspect.signature(model.forward).parameters
    assert diffusers.FluxImg2ImgPipeline.from_pipe(tiny_flux).transformer is model


def test_no_block_runs_on_a_skipped_call_and_the_output_is_the_same(tiny_flux, executions):
    model = tiny_flux.transformer
    counts = executions(model)
    attach(model, ReuseFromSecond())
    first = flux_call(model).sample
    assert len(counts) == 2 and set(counts.values()) == {1}
    second = flux_call(model, return_dict=False)[0]
    assert set(counts.values()) == {1}
    assert torch.equal(first, second)
    assert [type(b) for b in model.transformer_blocks] and len(model.transformer_blocks) == 1


def test_a_feature_of_another_shape_is_not_injected(tiny_flux):
    attach(tiny_flux.transformer, ReuseFromSecond())
    flux_call(tiny_flux.transformer)
    assert flux_call(tiny_flux.transformer, length=20) is None


def test_an_error_in_the_model_leaves_no_skip_behind(tiny_flux):
    model = tiny_flux.transformer
    output = flux_call(model).sample
    controller = ReuseFromSecond()
    attach(model, controller)
    flux_call(model)
    with pytest.raises(AttributeError):
        flux_call(model, txt_ids=None)
    controller.feature = None
    assert torch.equal(flux_call(model).sample, output)


def test_arguments_are_found_by_name_and_by_position(tiny_flux):
    denoiser = attach(tiny_flux.transformer, plain)
    assert denoiser.latent((), {"hidden_states": 1}) == 1
    assert denoiser.latent((1, 2), {}) == 1
    assert denoiser.argument("encoder_hidden_states", (1, 2), {}) == 2
    assert denoiser.argument("timestep", (1, 2), {}) is None
    assert denoiser.argument("nothing", (1,), {}) is None


def test_a_deepcopy_is_a_plain_model_of_its_own(tiny_flux):
    model = tiny_flux.transformer
    before = fingerprint(model)
    attach(model, plain, tiny_flux)
    clone = copy.deepcopy(model)
    assert fingerprint(clone) == before
    assert attached(clone) is None and clone._cache_config is None
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert not torch.equal(flux_call(clone).sample, flux_call(model).sample)
    assert attached(model) is not None
    blocks = copy.deepcopy(model.transformer_blocks)
    assert type(blocks) is nn.ModuleList
    assert type(model.transformer_blocks[:1]) is nn.ModuleList


def test_saving_keeps_class_name_and_keys_and_pickling_is_refused(tiny_flux, tmp_path):
    model = tiny_flux.transformer
    attach(model, plain, tiny_flux)
    tiny_flux.save_pretrained(tmp_path)
    again = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    weights = model.state_dict()
    assert list(again.state_dict()) == list(weights)
    assert all(torch.equal(again.state_dict()[name], weights[name]) for name in weights)
    assert '"FluxTransformer2DModel"' in (tmp_path / "model_index.json").read_text()
    with pytest.raises(LesaError, match="disable first"):
        pickle.dumps(model)


def test_nothing_keeps_the_model_alive(tiny_flux):
    model = diffusers.FluxTransformer2DModel.from_config(tiny_flux.transformer.config)
    denoiser = attach(model, plain)
    alive = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert alive() is None  # by reference counts alone: there is no cycle
    finally:
        gc.enable()
    with pytest.raises(LesaError, match="freed"):
        _ = denoiser.model


def test_other_caches_and_a_second_attach_are_refused(tiny_flux):
    model = tiny_flux.transformer
    model.enable_cache(diffusers.FirstBlockCacheConfig())
    with pytest.raises(LesaError, match="FirstBlockCacheConfig"):
        attach(model, plain)
    model.disable_cache()
    diffusers.hooks.apply_first_block_cache(model, diffusers.FirstBlockCacheConfig())
    with pytest.raises(LesaError, match="cache hook"):
        attach(model, plain)
    other = diffusers.FluxTransformer2DModel.from_config(model.config)
    attach(other, plain)
    with pytest.raises(LesaError, match="already"):
        attach(other, plain)
    with pytest.raises(ValueError, match="already been enabled"):
        other.enable_cache(diffusers.FirstBlockCacheConfig())


def test_a_class_can_be_registered():
    with pytest.raises(LesaError, match="ModelSpec.blocks="):
        register_model(ModelSpec("Mine", ()))

    class MyFlux(diffusers.FluxTransformer2DModel):
        pass

    assert model_spec(MyFlux.__new__(MyFlux)).name == "FluxTransformer2DModel"
    register_model(ModelSpec("MyFlux", ("transformer_blocks",)))
    assert model_spec(MyFlux.__new__(MyFlux)).name == "MyFlux"
    with pytest.raises(LesaError, match="spec='MyFlux': not a row; give a lesa.ModelSpec"):
        register_model("MyFlux")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"blocks": "stages"}, r"ModelSpec.blocks='stages': not a tuple of names; give one, as"),
        ({"conditioning": [3]}, r"ModelSpec.conditioning=\[3\]: not a tuple of names"),
        (
            {"taps": ("outputs",)},
            r"ModelSpec.taps=\('outputs',\): unknown; give 'hidden' or 'output'",
        ),
    ],
)
def test_a_row_of_wrong_fields_is_told(fields, told):
    with pytest.raises(LesaError, match=told):
        ModelSpec("Mine", **fields)


class Staged(nn.Module):
    """A denoiser of somebody's own."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.Linear(4, 4)])
        self.last = nn.LayerNorm(4)

    def forward(self, hidden_states, timestep):
        for stage in self.stages:
            hidden_states = stage(hidden_states)
        return self.last(hidden_states)


@pytest.fixture
def own_rows(monkeypatch):
    """Rows that are registered here are gone afterwards."""
    monkeypatch.setattr("lesa.hooks.model_specs._SPECS", known_models())


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"blocks": ("stage",)}, "stage"),
        ({"tail": "norm_out"}, "norm_out"),
        ({"embedding": "time_embed"}, "time_embed"),
    ],
)
def test_a_row_that_names_what_the_model_lacks_changes_nothing(own_rows, wrong, name):
    register_model(ModelSpec("Staged", **{"blocks": ("stages",), "tail": "last", **wrong}))
    model, told = Staged(), f"model: this Staged has no '{name}', which its row names; correct"
    for put in (
        lambda: attach(model, plain),
        lambda: lesa.apply_lesa_cache(model, lesa.LesaConfig(num_inference_steps=4)),
    ):
        with pytest.raises(LesaError, match=told):
            put()
        assert (type(model), type(model.stages)) == (Staged, nn.ModuleList)
        assert not model.last._forward_pre_hooks


def test_a_row_with_the_output_tap_alone_needs_no_tail(own_rows):
    register_model(ModelSpec("Staged", taps=("output",)))
    model = Staged()
    lesa.apply_lesa_cache(model, lesa.LesaConfig(num_inference_steps=4))
    assert attached(model)


@pytest.mark.parametrize("name", sorted(set(known_models()) - {"MyFlux"}))
def test_rows_name_real_arguments_and_modules(name):
    cls = getattr(diffusers, name)
    spec = model_spec(cls.__new__(cls))
    known = inspect.signature(cls.forward).parameters
    assert {spec.latent, *spec.conditioning, *spec.unbatched, *spec.zeroed} <= set(known)
    source = inspect.getsource(cls.__init__)
    paths = (*spec.blocks, *spec.last, *spec.identities, spec.tail)
    parts = {path.split(".")[0] for path in paths}
    assert all(f"self.{part} =" in source for part in parts)


def wan():
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
    ).to(torch.bfloat16)
    call = {
        "hidden_states": torch.randn(1, 4, 1, 8, 8).bfloat16(),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, 16).bfloat16(),
    }
    return model, call


def unet():
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    call = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 6, 16),
        "down_block_additional_residuals": [
            torch.randn(2, c, s, s) for c, s in ((8, 8), (8, 8), (8, 4), (16, 4))
        ],
        "mid_block_additional_residual": torch.randn(2, 16, 4, 4),
    }
    return model, call


@pytest.mark.parametrize("make", [wan, unet])
def test_upcast_features_and_models_with_a_middle_block(make):
    torch.manual_seed(0)
    model, call = make()
    model.eval()
    controller = ReuseFromSecond()
    with torch.no_grad():
        expected = model(**call).sample
        attach(model, controller)
        assert torch.equal(model(**call).sample, expected)
        assert torch.equal(model(**call).sample, expected)
    assert controller.feature.dtype == next(model.parameters()).dtype
    detach(model)
    with torch.no_grad():
        assert torch.equal(model(**call).sample, expected)


def count_graphs():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    return graphs, backend


def test_a_compiled_model_has_one_graph_for_full_and_one_for_skipped(tiny_flux):
    torch.compiler.reset()
    model = tiny_flux.transformer
    expected = flux_call(model).sample
    graphs, backend = count_graphs()
    attach(model, ReuseFromSecond())
    model.compile(fullgraph=True, backend=backend)
    found = [flux_call(model).sample for _ in range(4)]
    assert len(graphs) == 2
    assert all(torch.equal(sample, expected) for sample in found)


def test_attach_around_torch_compile(tiny_flux):
    torch.compiler.reset()
    core = tiny_flux.transformer
    expected = flux_call(core).sample
    graphs, backend = count_graphs()
    model = torch.compile(core, fullgraph=True, backend=backend)
    before = type(model)
    attach(model, ReuseFromSecond())
    with model.cache_context("cond"):
        found = [flux_call(model).sample for _ in range(3)]
    assert len(graphs) == 2
    assert all(torch.equal(sample, expected) for sample in found)
    detach(model)
    assert type(model) is before and core._cache_config is None
    assert torch.equal(flux_call(core).sample, expected)


def test_outputs_are_read_and_made():
    sample = torch.ones(2)
    output = diffusers.models.modeling_outputs.Transformer2DModelOutput(sample=sample)
    for kind in (output, (sample,), sample):
        assert read_sample(kind) is sample
        made = make_output(kind_of(kind), sample)
        assert type(made) is type(kind) and read_sample(made) is sample
    assert read_sample((sample, sample)) is None
    listed = ([sample, 2 * sample],)  # a tensor for every picture
    batch = read_sample(listed)
    assert torch.equal(batch, torch.stack(listed[0]))
    (made,) = make_output(kind_of(listed), batch)
    assert isinstance(made, list) and all(map(torch.equal, made, listed[0]))
    assert read_sample(([sample, torch.ones(3)],)) is None
