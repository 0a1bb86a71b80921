"""lesa in a stand-in of ComfyUI (`comfy_stub`), against lesa in the diffusers pipeline."""

from __future__ import annotations

import asyncio
import logging
from importlib import reload
from types import SimpleNamespace

import pytest
import torch

import lesa
from lesa.core.schedule import Schedule
from lesa.engine.config import LesaConfig
from lesa.errors import LesaError
from lesa.integrations import comfyui
from lesa.integrations.comfyui_samplers import run_of_sampler
from tests.integrations import comfy_stub as stub
from tests.integrations.captured import FULL, STEPS, captured, trained, under_lesa


class Flux:
    """diffusers' transformer with ComfyUI's arguments, and the name of its class there."""

    def __init__(self, transformer):
        self.transformer, self.calls = transformer, 0

    def __call__(self, x, timestep, *, transformer_options, **kwargs):
        self.calls += 1
        kwargs |= {name: kwargs[name][0] for name in ("img_ids", "txt_ids")}
        return self.transformer(x, timestep=timestep, **kwargs).sample


@pytest.fixture(scope="module")
def case():
    """A pipeline, what it makes with a trained forecaster, and the same in ComfyUI's words."""
    case = captured()
    case.forecaster = trained(case.levels, latent=True)
    case.own = under_lesa(case, case.forecaster)
    for cond in case.conds:
        cond |= {name: cond[name][None] for name in ("img_ids", "txt_ids")}
    case.conds = [{k: v for k, v in cond.items() if v is not None} for cond in case.conds]
    return case


def patcher(case, sampling=None):
    return stub.ModelPatcher(Flux(case.pipe.transformer), sampling or stub.CONST())


@torch.no_grad()
def sample(case, model, *, sampler=stub.EULER, together=True):
    guider = stub.Guider(model, case.conds, case.cfg, together)
    before = dict(guider.model_options)
    found = guider.sample(case.latents, case.sigmas, sampler)
    assert guider.model_options == before  # nothing is left of the run
    return found


@pytest.mark.parametrize("together", [True, False])
def test_the_pictures_are_those_of_lesa(case, together):
    """Guidance in one batch, and as calls of their own; the second run is like the first."""
    config = LesaConfig(forecaster=case.forecaster, schedule=FULL)
    base = patcher(case)
    model = comfyui.apply(base, config)
    found = [sample(case, model, together=together) for _ in range(2)]
    calls = 2 * len(FULL.bind(STEPS).full_steps) * (1 if together else 2)
    assert base.get_model_object("diffusion_model").calls == calls
    torch.testing.assert_close(found[0], case.own, rtol=0, atol=1e-5)  # other sums, fp32
    assert torch.equal(*found)
    assert not torch.allclose(case.own, case.plain, atol=1e-3)
    torch.testing.assert_close(sample(case, base), case.plain, rtol=0, atol=1e-5)


def test_a_sampler_that_looks_twice_is_computed_in_full(case, caplog):
    model = comfyui.apply(patcher(case), LesaConfig(full_steps=3))
    with caplog.at_level(logging.INFO, "lesa"):
        found = sample(case, model, sampler=stub.HEUN)
    assert torch.equal(found, sample(case, patcher(case), sampler=stub.HEUN))
    assert "15 sample_heun calls the model more than once a step" in caplog.text

    def renamed(*args):
        return stub.sample_heun(*args)

    model = comfyui.apply(patcher(case), LesaConfig(schedule=Schedule.explicit([0, 1, 2])))
    with caplog.at_level(logging.INFO, "lesa"):
        sample(case, model, sampler=SimpleNamespace(sampler_function=renamed))
    assert "not at a new step of the run" in caplog.text


def test_a_prompt_that_comes_later_begins_with_a_full_step(case):
    """ComfyUI's prompts may have a share of the run of their own."""
    model = comfyui.apply(patcher(case), LesaConfig(lesa.Taylor(1), schedule=FULL))
    guider = stub.Guider(model, case.conds, case.cfg, together=False)
    first, calls = guider.conds, guider.model_patcher.get_model_object("diffusion_model")

    def two_prompts(denoised, x, sigmas):
        for i in range(STEPS):
            guider.conds = first[:1] if i < 2 else first
            x = x + (x - denoised(x, sigmas[i])) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        return x

    with torch.no_grad():
        guider.sample(case.latents, case.sigmas, SimpleNamespace(sampler_function=two_prompts))
    assert calls.calls == 3 + 2  # steps 0, 1, 4 of the one; 2 and 4 of the other


def test_levels_of_other_models_are_ratios():
    run = run_of_sampler(stub.EULER, [14.6, 1.0, 0.0], stub.RatioSampling())
    assert run.sigmas == pytest.approx((14.6 / 15.6, 0.5, 0.0))
    noisy = SimpleNamespace(sampler_function=SimpleNamespace(__name__="sample_dpmpp_2m_sde"))
    run = run_of_sampler(noisy, [0.9, 0.5, 0.0], stub.CONST())
    assert (run.sigmas, run.noise, run.multistep) == ((0.9, 0.5, 0.0), True, True)


def test_mistakes_are_one_sentence_before_a_step_runs(case):
    with pytest.raises(LesaError, match="trained for model_class='FluxTransformer2DModel'"):
        wrong = patcher(case)
        wrong.parts["diffusion_model"] = type("WanModel", (), {})()
        comfyui.apply(wrong, LesaConfig(forecaster=case.forecaster))
    with pytest.raises(LesaError, match="NextDiT is not known to return the same"):
        wrong.parts["diffusion_model"] = type("NextDiT", (), {})()
        comfyui.apply(wrong, LesaConfig(forecaster=case.forecaster))
    with pytest.raises(LesaError, match="output tap only"):
        comfyui.apply(patcher(case), LesaConfig(tap="hidden"))
    model = comfyui.apply(patcher(case), LesaConfig(full_steps=9))
    with pytest.raises(LesaError, match="full_steps=9: the run has 8 steps"):
        sample(case, model)
    assert model.get_model_object("diffusion_model").calls == 0


def test_the_nodes_load_apply_and_take_a_budget(case, monkeypatch, tmp_path):
    stub.install(monkeypatch, tmp_path)
    case.forecaster.save_pretrained(tmp_path / "lesa" / "mine")
    from lesa.integrations import comfyui_nodes

    nodes = reload(comfyui_nodes)
    loader, use = asyncio.run(nodes.comfy_entrypoint().get_node_list())
    (choice,) = loader.define_schema().inputs
    assert choice.options == ["lesa-untrained", "taylor-1", "fora", "mine"]
    assert [each.id for each in use.define_schema().inputs][:2] == ["model", "forecaster"]
    (forecaster,) = loader.execute("mine")
    (model,) = use.execute(patcher(case), forecaster, 3, 0.0)
    torch.testing.assert_close(sample(case, model), case.own, rtol=0, atol=1e-5)
    with pytest.raises(LesaError, match="exclude each other"):
        use.execute(patcher(case), forecaster, 3, 2.0)
    (untrained,) = loader.execute("lesa-untrained")
    (model,) = use.execute(patcher(case), untrained, 0, 2.0)
    sample(case, model)
    assert model.get_model_object("diffusion_model").calls == 4
