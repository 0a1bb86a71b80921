"""DisCa: an untrained predictor is reuse, a trained one is better, and nothing of it stays."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import build as tiny

import lesa
from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.evaluation import Bench, build
from lesa.evaluation.methods import unfit
from lesa.evaluation.peers import disca as disca_module
from lesa.evaluation.peers.disca import Predictor, count_parameters, disca, train_predictor
from lesa.evaluation.ranking import opponents
from lesa.evaluation.runs import generate
from lesa.forecasters.reuse import Reuse
from lesa.hooks.wrappers import core_of
from lesa.training import disca as own_training
from lesa.training import disca_data

STEPS, PROMPTS = 4, 3
SCHEDULE = Schedule.explicit((0, 2), STEPS)


def make(name):
    """A bench on which every prompt has an embedding of its own."""
    pipe, call = tiny(name)
    settings = call(PROMPTS, num_inference_steps=STEPS, output_type="latent")
    del settings["generator"]
    draw = torch.Generator().manual_seed(2)
    for key in ("prompt_embeds", "negative_prompt_embeds"):
        settings[key] = settings[key] + torch.randn(settings[key].shape, generator=draw)
    return Bench(STEPS, pipe, settings, ["a", "b", "c"])


def latents(bench):
    return generate(bench.pipe, bench.calibration, range(PROMPTS), bench.settings).images


@pytest.fixture(params=["flux", "qwen"])
def bench(request):
    return make(request.param)


def test_an_untrained_predictor_reuses_the_last_feature(bench):
    with lesa.accelerate(bench.pipe, Reuse(tap="hidden"), schedule=SCHEDULE):
        reused = latents(bench)
    with disca(bench.pipe, Predictor(bench.pipe.transformer), SCHEDULE) as use:
        predicted = latents(bench)
        held = use.cache_bytes()
    torch.testing.assert_close(predicted, reused)
    tokens = predicted.shape[1] if predicted.ndim == 3 else predicted[0, 0].numel() // 4
    width = bench.pipe.transformer.inner_dim
    assert held == 2 * PROMPTS * tokens * width * 4  # two guidance branches, fp32


def test_training_brings_it_nearer_to_the_plain_run(bench, monkeypatch):
    monkeypatch.setattr(disca_module, "EPOCHS", 6)
    monkeypatch.setattr(disca_module, "ROUNDS", 2)
    before = {name: value.clone() for name, value in bench.pipe.transformer.state_dict().items()}
    plain = latents(bench)

    def error(predictor):
        with disca(bench.pipe, predictor, SCHEDULE):
            return (latents(bench) - plain).norm().item()

    trained = train_predictor(bench, SCHEDULE)
    assert error(trained) < 0.8 * error(Predictor(bench.pipe.transformer))
    assert torch.equal(latents(bench), plain)
    after = bench.pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_pipeline_loaded_in_inference_mode_is_imitated_too(monkeypatch):
    """As servers load them: its weights and the states that it computes know no gradients."""
    monkeypatch.setattr(disca_module, "EPOCHS", 1)
    monkeypatch.setattr(disca_module, "ROUNDS", 2)
    with torch.inference_mode():
        bench = make("qwen")
        predictor = train_predictor(bench, SCHEDULE)
        with disca(bench.pipe, predictor, SCHEDULE):
            assert latents(bench).isfinite().all()
    assert any(part.abs().max() > 0 for part in predictor.out.parameters())  # 0 untrained


def test_a_skipped_step_runs_two_blocks_and_none_of_the_models(bench):
    model = core_of(bench.pipe.transformer)
    predictor, ran = Predictor(model), []
    blocks = {name: module for name, module in model.named_modules() if name[-2:-1] == "."}
    blocks = {n: m for n, m in blocks.items() if type(m) is type(predictor.blocks[-1])}
    for name, block in blocks.items():
        block.register_forward_hook(lambda *_, name=name: ran.append(name))
    for block in predictor.blocks:
        block.register_forward_hook(lambda *_: ran.append("predictor"))
    with disca(bench.pipe, predictor, SCHEDULE):
        latents(bench)
    branches = 2
    assert ran.count("predictor") == 2 * 2 * branches
    assert len(blocks) == 2 and all(ran.count(name) == 2 * branches for name in blocks)


def test_built_at_a_number_of_full_steps_or_on_a_list(monkeypatch):
    monkeypatch.setattr(disca_module, "EPOCHS", 0)
    bench = make("flux")
    method = build("disca", 2, bench)
    assert method.schedule.full_steps == (0, 2)
    assert method.schedule_text.startswith("own: 0,2; a predictor of")
    share = count_parameters(method.applied.keywords["predictor"])
    share /= count_parameters(bench.pipe.transformer)
    assert f"{100 * share:.1f} %" in method.note
    listed = build("disca", 2, bench, searched=Schedule.explicit((0, 1)))
    assert listed.schedule.full_steps == (0, 1) and listed.origin == "searched"


def test_where_it_cannot_run():
    bench = make("flux")
    assert unfit("disca", bench) is None
    with pytest.raises(LesaError, match="few-step models; give at most 16 steps"):
        build("disca", 5, Bench(50, bench.pipe, bench.settings, bench.calibration))
    assert "calibration prompts" in unfit("disca", Bench(STEPS, bench.pipe, bench.settings))
    assert "not WanTransformer3DModel" in unfit("disca", Bench(STEPS, tiny("wan")[0], {}, ["a"]))
    assert unfit("disca", Bench(STEPS)) is not None


def test_lesas_own_form_is_a_method_and_no_opponent(monkeypatch):
    monkeypatch.setattr(disca_data, "PICTURES", 3)
    for name in ("ROWS_FIRST", "TOGETHER"):
        monkeypatch.setattr(own_training, name, 4)
    bench = make("flux")
    method = build("lesa-disca", 2, bench)
    assert method.label == "lesa-disca @2" and method.schedule.full_steps[0] == 0
    assert method.schedule in method.forecaster.calibrated
    share = method.forecaster.metadata["network_share"]
    assert f"a network of {100 * share:.1f} % of the parameters" in method.schedule_text
    listed = build("lesa-disca", 2, bench, searched=Schedule.explicit((0, 1)))
    assert listed.schedule.full_steps == (0, 1)
    row = {"label": "lesa-disca @2", "method": "lesa-disca", "full_steps": 2, "psnr_mean": 99.0}
    peer = {**row, "label": "disca @2", "method": "disca"}
    rows = [{**each, "schedule": "own: 0,2"} for each in (row, peer)]
    assert [found["method"] for found in opponents(rows, 2)] == ["disca"]


def test_where_lesas_own_form_cannot_run():
    bench = make("flux")
    assert unfit("lesa-disca", bench) is None
    assert "at most 16 steps" in unfit("lesa-disca", Bench(50, bench.pipe, {}, ["a"]))
    assert "calibration prompts" in unfit("lesa-disca", Bench(STEPS, bench.pipe, bench.settings))
    assert "alone (" in unfit("lesa-disca", Bench(STEPS, tiny("sdxl")[0], {}, ["a"]))
    saved = type("P", (), {"unet": type("UNet2DConditionModel", (torch.nn.Module,), {})()})()
    assert "alone (" in unfit("lesa-disca", Bench(STEPS, saved, {}, ["a"]))  # as compare asks first
    assert unfit("lesa-disca", Bench(STEPS)) == "needs a pipeline"
