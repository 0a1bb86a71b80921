"""The form "disca": training runs what the engine runs, and comes nearer than reuse."""

from __future__ import annotations

import diffusers
import pytest
import torch
from training_jobs import STEPS, make

import lesa
from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.evaluation.runs import generate
from lesa.training import disca, disca_data
from lesa.training.collect import collect
from lesa.training.disca_data import record
from lesa.training.disca_run import Accelerated
from lesa.training.job import Job
from lesa.util.progress import Progress

PLAN = Schedule.explicit((0, 3), STEPS)
PROMPTS = 4


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name, value in {"PICTURES": 6, "JUDGES": 2}.items():
        monkeypatch.setattr(disca_data, name, value)
    for name, value in {"ROWS_FIRST": 4, "TOGETHER": 24}.items():
        monkeypatch.setattr(disca, name, value)


def trained(name, schedule=PLAN, **more):
    pipe, call = make(name, PROMPTS)
    titles, log = [f"prompt {i}" for i in range(PROMPTS)], Progress(quiet=True)
    options = {"full_steps": 2, "schedule": schedule, "call": call, "progress": log}
    options |= {"validation": 1, **more}
    return pipe, call, titles, log, lesa.train(pipe, titles, STEPS, form="disca", **options)


def latents(pipe, call, titles):
    settings = {**call, "num_inference_steps": STEPS, "output_type": "latent"}
    return generate(pipe, titles, range(len(titles)), settings).images


@pytest.mark.parametrize("name", ["flux", "sd3"])  # two calls a step, and one of both parts
def test_the_engine_runs_what_training_ran(name, monkeypatch):
    runs, store = [], disca._store

    def kept(forecaster, run, statistics):
        runs.append(run)
        store(forecaster, run, statistics)

    monkeypatch.setattr(disca, "_store", kept)
    pipe, call, titles, _, forecaster = trained(name)
    batch = record(Job(pipe, titles, call), range(PROMPTS), STEPS)
    with torch.no_grad():
        expected = runs[0](batch)
    with lesa.accelerate(pipe, forecaster):
        found = latents(pipe, call, titles)
        stats = lesa.stats(pipe)
    assert stats.skipped == 2 * stats.full and not stats.fallbacks
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)  # the sampler was identified


def test_it_is_nearer_than_reuse_and_than_it_began():
    pipe, call, titles, log, forecaster = trained("flux")
    plain = latents(pipe, call, titles)

    def error(used):
        with lesa.accelerate(pipe, used, schedule=PLAN, tap="output"):
            return float((latents(pipe, call, titles) - plain).norm())

    began = lesa.LesaForecaster("disca", branches=forecaster.branches)
    entry = forecaster.calibrations[0]
    for branch, rows in entry.rows.items():
        began.correct(PLAN, entry.sigmas, branch, torch.zeros_like(rows))
    blocks = disca.TwoBlocks(pipe.transformer).state_dict()
    began.net.learn(blocks, {branch: torch.ones(STEPS) for branch in forecaster.branches})
    assert error(forecaster) < 0.7 * min(error(began), error(lesa.Reuse()))
    told = "\n".join(log.lines)
    assert "2 of 6 steps in full (0, 3), two blocks of" in told and "held out" in told
    assert "plain generations per prompt" in told


def test_the_model_is_as_it_was():
    pipe, call = make("qwen", PROMPTS)
    model = pipe.transformer
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked = [part.requires_grad for part in model.parameters()]
    titles = [f"prompt {i}" for i in range(PROMPTS)]
    plain = latents(pipe, call, titles)
    options = {"schedule": PLAN, "call": call, "validation": 0, "progress": False}
    lesa.train(pipe, titles, STEPS, 2, form="disca", **options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert asked == [part.requires_grad for part in model.parameters()]
    assert all(part.grad is None for part in model.parameters())
    assert torch.equal(latents(pipe, call, titles), plain)


def test_an_interrupt_keeps_the_best_so_far(monkeypatch):
    moves, move = [], disca._Trainer._move

    def stopped(*given):
        moves.append(1)
        if len(moves) == 20:
            raise KeyboardInterrupt
        move(*given)

    monkeypatch.setattr(disca._Trainer, "_move", stopped)
    pipe, call, titles, log, forecaster = trained("flux")
    assert forecaster.metadata["interrupted"] and any("interrupted" in line for line in log.lines)
    with lesa.accelerate(pipe, forecaster):
        assert latents(pipe, call, titles).isfinite().all()
        assert not lesa.stats(pipe).fallbacks
    assert forecaster.net.weights["join.weight"].abs().max() > 0  # after two of four rounds' ends


def test_a_folder_gives_it_back_to_the_last_bit(tmp_path):
    pipe, call, titles, _, forecaster = trained("flux", schedule=None)
    forecaster.save_pretrained(tmp_path)
    again = lesa.LesaForecaster.from_pretrained(tmp_path)
    assert again.name == "lesa-disca" and again.calibrated == forecaster.calibrated
    with lesa.accelerate(pipe, forecaster):
        expected = latents(pipe, call, titles)
    with lesa.accelerate(pipe, str(tmp_path)):
        assert torch.equal(latents(pipe, call, titles), expected)
    forecaster.net.gains.popitem()
    forecaster.save_pretrained(tmp_path)
    with pytest.raises(LesaError, match="no predictor with a gain for each guidance branch; copy"):
        lesa.LesaForecaster.from_pretrained(tmp_path)


def test_a_pipeline_loaded_in_inference_mode_is_trained_too():
    with torch.inference_mode():
        pipe, call, titles, _, forecaster = trained("flux")
        with lesa.accelerate(pipe, forecaster):
            assert latents(pipe, call, titles).isfinite().all()
    assert forecaster.net.weights["join.weight"].abs().max() > 0  # 0 untrained


@pytest.mark.parametrize(
    ("name", "changed", "told"),
    [
        ("sdxl", {}, "the blocks of UNet2DConditionModel cannot run alone .*; use form="),
        ("wan-2.2", {}, "form='disca': .* has 2 transformers; use form="),
        ("flux", {"full_steps": [2, 3], "schedule": None}, r"full_steps=\[2, 3\]: form='disca'"),
        ("flux", {"tap": "hidden"}, "tap='hidden' does not go with form='disca'"),
    ],
)
def test_what_cannot_be_is_told_before_anything_runs(name, changed, told, monkeypatch):
    monkeypatch.setattr(Job, "run", lambda *_: pytest.fail("the pipeline ran"))
    with pytest.raises(LesaError, match=told):
        trained(name, **changed)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        diffusers.UniPCMultistepScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_sampler_that_never_can_be_followed_is_told_before_anything_runs(scheduler, monkeypatch):
    monkeypatch.setattr(Job, "run", lambda *_: pytest.fail("the pipeline ran"))
    pipe, call = make("flux", PROMPTS)
    pipe.scheduler = scheduler
    with pytest.raises(LesaError, match=r"scheduler=\w+: form='disca' follows the latent"):
        lesa.train(pipe, ["a"] * PROMPTS, STEPS, 2, form="disca", call=call, progress=False)


def test_a_sampler_that_cannot_be_followed_is_told(monkeypatch):
    monkeypatch.setattr("lesa.training.sampler.TRUSTED", -1.0)
    with pytest.raises(
        LesaError, match="follows the latent from step to step.*; use a first-order"
    ):
        trained("qwen")


@pytest.mark.parametrize("spares", [False, True])
def test_gradients_are_those_of_the_whole_run_through_full_steps(spares):
    """As by differences; also where full steps are run again to spare memory."""
    pipe, call = make("flux", 2)
    pipe.transformer.requires_grad_(False)
    job = Job(pipe, ["a", "b"], call)
    statistics = collect(job, STEPS)
    batch, blocks = record(job, range(2), STEPS), disca.TwoBlocks(pipe.transformer)
    run = Accelerated(pipe.transformer, blocks, "hidden_states", PLAN, statistics, 3)
    run.spares_memory = spares
    branch = statistics.branches[0]
    row = run.rows[branch]

    def loss():
        return disca._error(run(batch), batch).mean()

    loss().backward()
    assert row.grad is not None and not row.grad[[0, 3]].any()
    for step in (1, 2):  # in front of the full step
        with torch.no_grad():
            row[step, -1] += 1e-2
            above = loss()
            row[step, -1] -= 2e-2
            below = loss()
            row[step, -1] += 1e-2
        slope = float(above - below) / 2e-2
        assert slope == pytest.approx(float(row.grad[step, -1]), rel=0.03)


def test_a_large_batch_also_judges(monkeypatch):
    """Where no prompt is held out and one batch has more pictures than rows are solved on."""
    monkeypatch.setattr(disca_data, "record", lambda job, rows, num_steps: list(rows))
    pipe, call = make("flux", PROMPTS)
    job = Job(pipe, [f"prompt {i}" for i in range(PROMPTS)], call, batch_size=64)
    data = disca_data.Data.of(job, STEPS)
    assert data.few == data.judged == [[0, 1, 2, 3]] and not data.apart
