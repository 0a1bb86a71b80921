"""Two blocks in place of all: exact in the state of the full step, for every class that can."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny_models
import torch
from model_checks import first_call
from tiny_pipelines import ROWS, build

from lesa.errors import LesaError
from lesa.hooks import model_specs
from lesa.hooks.alone import blocks_of, check_two_blocks, unfit, unfit_class
from lesa.hooks.outputs import read_sample
from lesa.hooks.pipeline import find_denoiser
from lesa.hooks.two_blocks import Noted, TwoBlocks

CANNOT = {
    "chroma",
    "z-image",
    "sdxl",
    "Lumina2Transformer2DModel",
    "Kandinsky5Transformer3DModel",
}
EVERY = {*ROWS, *tiny_models.ROWS}
MODELS = Path(__file__).parents[2] / "docs" / "models.md"


def started(name):
    """A denoiser, and a function that runs its first call."""
    if name in tiny_models.ROWS:
        model, arguments = tiny_models.build(name)
        return model, lambda: read_sample(model(**arguments))
    pipe, call = build(name)
    model = find_denoiser(pipe)
    args, kwargs = first_call(pipe, call(num_inference_steps=2))
    return model, lambda: read_sample(model(*args, **kwargs))


def bridged(model, run, two):
    noted = Noted()
    with noted.of(model):
        output = run()
    return output, two.bridge(model, noted, run)


@pytest.mark.parametrize("name", sorted(EVERY - CANNOT))
@torch.no_grad()
def test_untrained_it_gives_the_output_of_the_full_step(name):
    model, run = started(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    two = TwoBlocks(model)
    output, bridge = bridged(model, run, two)
    ran = []
    for block in blocks_of(model):
        block.register_forward_hook(lambda *_: ran.append(1))
    with two.in_place_of_blocks(model, bridge):
        again = run()
    assert not ran
    scale = float(output.abs().max())
    torch.testing.assert_close(again, output, rtol=1e-5, atol=1e-6 * scale)  # one sum more
    assert len(bridge) >= 1 and all(part.ndim == 3 for part in bridge.values())
    torch.nn.init.normal_(two.join.weight)
    with two.in_place_of_blocks(model, bridge):
        assert not torch.allclose(run(), output)
    assert torch.equal(run(), output) and ran
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", sorted(CANNOT))
def test_a_class_whose_blocks_cannot_run_alone_is_told_in_a_sentence(name):
    model, _ = started(name)
    with pytest.raises(
        LesaError, match=r"form='disca': the blocks of .* cannot run alone \(.*\); use"
    ):
        check_two_blocks(model)
    with pytest.raises(LesaError, match="cannot run alone"):
        TwoBlocks(model)


def test_docs_name_the_classes_that_can_and_those_that_cannot():
    text = MODELS.read_text().split("## A network on skipped steps")[1].split("\n## ")[0]
    can, cannot = text.split("| cannot |")
    for row in model_specs._ROWS:
        model = type(row.name, (torch.nn.Module,), {})()
        assert f"`{row.name}`" in (can if unfit_class(model) is None else cannot)
    assert text.count("Model`") == len(model_specs._ROWS)


def test_a_model_that_is_compiled_as_a_whole_cannot_take_it():
    model = find_denoiser(build("qwen")[0])
    assert unfit(model) is None
    assert "compiled as a whole" in unfit(torch.compile(model, backend="eager"))
    compiled = copy.deepcopy(model)
    compiled.compile(backend="eager")
    assert "compiled as a whole" in unfit(compiled)


@torch.no_grad()
def test_blocks_in_float32_serve_a_model_in_bfloat16():
    pipe, call = build("flux")
    model = find_denoiser(pipe)
    args, kwargs = first_call(pipe, call(num_inference_steps=2))
    model.to(torch.bfloat16)
    kwargs = {
        key: value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in kwargs.items()
    }
    seen, two = [], TwoBlocks(model).float()
    two.last.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    output, bridge = bridged(model, lambda: read_sample(model(*args, **kwargs)), two)
    with two.in_place_of_blocks(model, bridge):
        again = read_sample(model(*args, **kwargs))
    assert seen == [torch.float32] and again.dtype == torch.bfloat16
    assert (again - output).norm() < 0.05 * output.norm()  # bfloat16 has 8 bits


@torch.no_grad()
def test_blocks_that_were_not_noted_are_told():
    model, run = started("qwen")
    with pytest.raises(LesaError, match="do not show what they get; leave them uncompiled"):
        TwoBlocks(model).bridge(model, Noted(), run)
