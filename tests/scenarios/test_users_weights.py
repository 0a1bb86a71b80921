"""Adapters, quantised weights, casting and offload: before, between and during generations."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from tiny_pipelines import build, run
from user_checks import at_step, check_nothing_stale, new_fallbacks, plain

import lesa
from lesa import LesaForecaster, Schedule, Taylor

THIRD = Schedule.fora(3)  # of six steps 0 and 3 are full
CHANGED = "adapters, attention processors or the ControlNet's scale changed"
BRANCHES = 2  # flux is built with true guidance, so each change shows in both


@pytest.fixture
def flux():
    pipe, call = build("flux")
    lesa.enable(pipe, Taylor(1), schedule=THIRD, tap="hidden")
    return pipe, call


def check_every_step_in_full_is_plain(pipe, call):
    """With interval 1 the output is the plain one, then with skipping nothing is stale."""
    expected = run(pipe, call())
    lesa.enable(pipe, Taylor(1), schedule=Schedule.every(1))
    assert torch.equal(run(pipe, call()), expected)
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    first = run(pipe, call())
    assert torch.equal(run(pipe, call()), first) and not torch.equal(first, expected)
    found = lesa.stats(pipe)
    assert found.skipped == 2 * found.full and found.fallbacks == {}
    lesa.disable(pipe)
    assert torch.equal(run(pipe, call()), expected)


def add_lora(model, name="a", targets=("to_q", "to_v", "proj_out")):
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=list(targets)), name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}" in key:  # made of zeros
                parameter.normal_(generator=torch.Generator().manual_seed(len(key)))
    model.set_adapters([name])


@pytest.fixture
def lora_file(tmp_path):
    """A LoRA of the tiny Flux, saved as users find them."""
    peft = pytest.importorskip("peft")
    pipe, _ = build("flux")
    add_lora(pipe.transformer)
    layers = peft.get_peft_model_state_dict(pipe.transformer, adapter_name="a")
    diffusers.FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    return tmp_path


def test_lora_comes_and_goes_between_calls(flux, lora_file):
    pipe, call = flux
    first = run(pipe, call())
    pipe.load_lora_weights(lora_file, adapter_name="a")
    loaded = check_nothing_stale(pipe, call)
    assert not torch.equal(loaded, first)
    pipe.set_adapters("a", 0.3)
    assert not torch.equal(check_nothing_stale(pipe, call), loaded)
    scaled = check_nothing_stale(pipe, call, joint_attention_kwargs={"scale": 0.5})
    assert not torch.equal(scaled, loaded)
    pipe.disable_lora()
    assert torch.equal(check_nothing_stale(pipe, call), first)
    pipe.enable_lora()
    pipe.set_adapters("a", 1.0)
    assert torch.equal(run(pipe, call()), loaded)
    pipe.fuse_lora()
    check_nothing_stale(pipe, call)
    pipe.unfuse_lora()
    check_nothing_stale(pipe, call)
    pipe.unload_lora_weights()
    torch.testing.assert_close(run(pipe, call()), first)  # what fusing rounded stays
    assert lesa.stats(pipe).fallbacks == {}


DURING = {
    "load": lambda pipe, folder: pipe.load_lora_weights(folder, adapter_name="b"),
    "unload": lambda pipe, folder: pipe.unload_lora_weights(),
    "scale": lambda pipe, folder: pipe.set_adapters("a", 0.3),
    "disable": lambda pipe, folder: pipe.disable_lora(),
    "disable_adapters": lambda pipe, folder: pipe.transformer.disable_adapters(),
    "delete": lambda pipe, folder: pipe.delete_adapters("a"),
    "fuse": lambda pipe, folder: pipe.fuse_lora(),
    "unfuse": lambda pipe, folder: pipe.unfuse_lora(),
    "attention processors": lambda pipe, folder: pipe.transformer.set_attn_processor(
        type(next(iter(pipe.transformer.attn_processors.values())))()
    ),
}


@pytest.mark.parametrize("name", DURING)
def test_lora_changes_during_a_generation(flux, lora_file, name):
    pipe, call = flux
    pipe.load_lora_weights(lora_file, adapter_name="a")
    if name == "unfuse":
        pipe.fuse_lora()
    first = run(pipe, call())
    change = at_step(0, lambda pipe, _: DURING[name](pipe, lora_file))
    assert new_fallbacks(pipe, call(callback_on_step_end=change)) == {CHANGED: BRANCHES}
    later = check_nothing_stale(pipe, call)
    if name in ("unload", "scale", "disable", "disable_adapters", "delete"):
        assert not torch.equal(later, first)


def test_the_scale_of_a_call_changes_during_a_generation(flux, lora_file):
    pipe, call = flux
    pipe.load_lora_weights(lora_file, adapter_name="a")

    def change(pipe, _):
        pipe._joint_attention_kwargs = {"scale": 0.2}

    options = {"joint_attention_kwargs": {"scale": 0.9}}
    disturbed = call(callback_on_step_end=at_step(0, change), **options)
    assert new_fallbacks(pipe, disturbed) == {"joint_attention_kwargs['scale'] changed": BRANCHES}
    check_nothing_stale(pipe, call, **options)
    check_nothing_stale(pipe, call)


def test_lora_before_enable_and_a_forecaster_trained_without_it():
    pipe, call = build("flux")
    add_lora(pipe.transformer)
    check_every_step_in_full_is_plain(pipe, call)
    trained = {"model_class": "FluxTransformer2DModel", "model_hash": "feedbeef"}
    forecaster = LesaForecaster(branches=("cond", "uncond"), metadata=trained)
    with pytest.warns(UserWarning, match="has the adapters a"):
        lesa.enable(pipe, forecaster, schedule=THIRD)


def test_a_change_of_adapters_that_fails_is_noticed_too(flux):
    pytest.importorskip("peft")
    pipe, call = flux

    def change(pipe, _):
        with pytest.raises(ValueError):
            pipe.transformer.set_adapter("nothing")

    disturbed = call(callback_on_step_end=at_step(0, change))
    assert new_fallbacks(pipe, disturbed) == {CHANGED: BRANCHES}
    check_nothing_stale(pipe, call)


def test_what_a_model_lacks_it_still_lacks():
    pipe, _ = build("dit")
    model = pipe.transformer
    known = [hasattr(model, name) for name in ("set_adapters", "attn_processors", "nothing")]
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    names = ("set_adapters", "attn_processors", "nothing")
    assert [hasattr(model, name) for name in names] == known
    assert known[-1] is False


def test_fine_tuned_weights_are_loaded_during_a_generation(flux):
    pipe, call = flux
    other = {name: value * 1.1 for name, value in pipe.transformer.state_dict().items()}
    change = at_step(0, lambda pipe, _: pipe.transformer.load_state_dict(other) and None)
    assert new_fallbacks(pipe, call(callback_on_step_end=change)) == {CHANGED: BRANCHES}
    check_nothing_stale(pipe, call)


def test_layerwise_casting():
    pipe, call = build("flux")
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    check_every_step_in_full_is_plain(pipe, call)


def test_torchao_int8():
    quantization = pytest.importorskip("torchao.quantization")
    pipe, call = build("flux")
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())
    check_every_step_in_full_is_plain(pipe, call)


def test_bitsandbytes_int8():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    pipe, call = build("flux")
    for block in pipe.transformer.transformer_blocks:
        layer = block.ff.net[2]
        eight = bitsandbytes.nn.Linear8bitLt(
            layer.in_features, layer.out_features, has_fp16_weights=False
        )
        eight.load_state_dict(layer.state_dict())
        block.ff.net[2] = eight.to("cpu")
    check_every_step_in_full_is_plain(pipe, call)


OFFLOADS = {
    "group, by block": lambda pipe: pipe.transformer.enable_group_offload(
        torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    ),
    "group, by leaf": lambda pipe: pipe.transformer.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level"
    ),
    "sequential": lambda pipe: sequential_offload(pipe),
    "model": lambda pipe: model_offload(pipe),
}


def sequential_offload(pipe):
    """What `enable_sequential_cpu_offload` does, which itself asks for an accelerator."""
    from accelerate import cpu_offload

    for model in (pipe.vae, pipe.transformer):
        cpu_offload(model, torch.device("cpu"))


def model_offload(pipe):
    """The hook of `enable_model_cpu_offload`, put back at the end of each call as there."""
    from accelerate import cpu_offload_with_hook

    _, hook = cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))
    pipe._all_hooks = [hook]
    pipe._offload_device = torch.device("cpu")
    pipe.enable_model_cpu_offload = lambda **_: model_offload(pipe)


@pytest.mark.parametrize("name", OFFLOADS)
@pytest.mark.parametrize("first", ["offload", "enable"])
def test_offload(name, first):
    pipe, call = build("flux")
    expected = run(pipe, call())
    reference = copy.deepcopy(pipe)
    reference.set_progress_bar_config(disable=True)
    lesa.enable(reference, Taylor(1), schedule=THIRD)
    forecast = run(reference, call())
    if first == "offload":
        OFFLOADS[name](pipe)
    lesa.enable(pipe, Taylor(1), schedule=THIRD)
    if first == "enable":
        OFFLOADS[name](pipe)
    for _ in range(3):
        assert torch.equal(run(pipe, call()), forecast)
    found = lesa.stats(pipe)
    assert (found.full, found.skipped, found.fallbacks) == (12, 24, {})
    lesa.disable(pipe)
    assert torch.equal(run(pipe, call()), expected)


def test_a_new_model_of_the_class_of_an_accelerated_one_is_plain(flux):
    pipe, call = flux
    kind, accelerated = type(pipe.transformer), run(pipe, call())
    model = kind.from_config(pipe.transformer.config).eval()
    model.load_state_dict(pipe.transformer.state_dict())
    assert type(model) is diffusers.FluxTransformer2DModel
    again, _ = build("flux")
    again.transformer = model
    assert torch.equal(run(again, call()), plain(pipe, call()))
    assert torch.equal(run(pipe, call()), accelerated)


def test_saving_while_enabled(flux, tmp_path):
    pipe, call = flux
    expected = plain(pipe, call())
    pipe.save_pretrained(tmp_path)
    model = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    cls = diffusers.FlowMatchEulerDiscreteScheduler
    again, _ = build("flux")
    again.transformer.load_state_dict(model.state_dict())  # mapped files are aligned differently
    again.scheduler = cls.from_pretrained(tmp_path / "scheduler")
    assert torch.equal(run(again, call()), expected)
    check_nothing_stale(pipe, call)
