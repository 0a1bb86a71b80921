"""Training against the truth: inner products, least squares, the engine's accelerated runs."""

from __future__ import annotations

import copy
from math import comb

import numpy as np
import pytest
import torch
from tiny_pipelines import build

import lesa
from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.forecasters.prior import prior_schedule
from lesa.testbed import captions, load, settings
from lesa.training.closed_loop import run_rollouts
from lesa.training.collect import collect
from lesa.training.fit import draw_steps, fit_continuous
from lesa.training.job import Job, call_arguments, weights_hash
from lesa.training.objective import objective
from lesa.training.rollout import Rollout, RolloutSpec
from lesa.training.search import (
    ALL,
    OpenLoop,
    candidates,
    first_gap,
    handicap,
    judge_of,
    search_schedule,
    shaped,
)
from lesa.training.statistics import Statistics, inner_products

STEPS = 12


@pytest.fixture(scope="module")
def pipe():
    return load("flux")


CALL = {key: value for key, value in settings("flux").items() if key != "num_inference_steps"}


@pytest.fixture(scope="module")
def statistics(pipe):
    return collect(Job(pipe, captions(3), CALL, batch_size=2), STEPS)


def reuse(schedule, sigmas, branch):
    rows = torch.zeros(schedule.num_steps, 4, dtype=torch.float64)
    rows[list(schedule.skipped_steps), 0] = 1
    return rows


def test_gram_equals_float64_inner_products_in_any_chunking():
    basis = torch.randn(5, 1001)
    exact = basis.double() @ basis.double().T / 1001
    for chunk in (7, 5 * 100, 1 << 20):
        torch.testing.assert_close(inner_products(basis, chunk), exact, rtol=1e-12, atol=1e-12)


def test_statistics_survive_a_file_and_damage_is_told(tmp_path, statistics):
    path = tmp_path / "statistics-12.safetensors"
    statistics.save(path)
    again = Statistics.load(path)
    assert again.prompts == statistics.prompts and again.sigmas == statistics.sigmas
    torch.testing.assert_close(again.joint, statistics.joint, rtol=0, atol=0)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LesaError, match="statistics-12.safetensors.*collect again"):
        Statistics.load(path)


def test_collect_does_not_depend_on_batches_and_leaves_no_trace(pipe, statistics):
    single = collect(Job(pipe, captions(3), CALL, batch_size=1), STEPS)
    torch.testing.assert_close(single.joint, statistics.joint, rtol=1e-4, atol=1e-6)
    assert type(pipe.transformer).__mro__[1].__name__ == "ModelMixin"


def test_euler_latents_are_sums_of_velocities(statistics):
    """x_{s+1} = x_s + dsigma v_s, so that combination of basis vectors has no energy."""
    for step in range(STEPS - 1):
        c = torch.zeros(statistics.size, dtype=torch.float64)
        c[statistics.latent(step + 1)], c[statistics.latent(step)] = 1, -1
        c[step] = statistics.sigmas[step] - statistics.sigmas[step + 1]
        assert c @ statistics.mean("cond") @ c < 1e-9


def test_interrupted_collection_resumes_to_the_same_statistics(pipe, statistics, tmp_path):
    calls = 0

    def interrupt(self, step, timestep, kwargs):
        nonlocal calls
        calls += 1
        if calls > STEPS + 3:
            raise KeyboardInterrupt
        return {}

    def job(call):
        return Job(pipe, captions(3), call, batch_size=1, folder=tmp_path)

    with pytest.raises(KeyboardInterrupt):
        collect(job({**CALL, "callback_on_step_end": interrupt}), STEPS)
    kept = Statistics.load(tmp_path / f"statistics-{STEPS}.safetensors")
    assert len(kept.prompts) == 1
    calls = -100
    finished = collect(job({**CALL, "callback_on_step_end": interrupt}), STEPS)
    assert finished.prompts == captions(3) and calls == -100 + 3 * STEPS
    torch.testing.assert_close(finished.joint, statistics.joint, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("known", [1, 2])
def test_a_training_that_goes_on_ends_in_the_same_weights(known, tmp_path):
    """Bit for bit, with batched guidance too, where rows round as their batch is."""
    tiny, make = build("sdxl")
    left_out = ("num_inference_steps", "generator", "output_type")
    call = {name: value for name, value in make(2).items() if name not in left_out}
    quick = {"form": "table", "refine": 1, "polish": 0, "batch_size": 1, "progress": False}
    rows = []
    for folder in (tmp_path / "at once", tmp_path / "goes on"):
        found = lesa.train(tiny, None, 6, 3, call=call, folder=folder, **quick)
        rows.append(found.calibrations[0].rows["default"])
        kept = Statistics.load(folder / "statistics-6.safetensors")
        kept.joint, kept.prompts = kept.joint[:known], kept.prompts[:known]
        (tmp_path / "goes on").mkdir(exist_ok=True)
        kept.save(tmp_path / "goes on" / "statistics-6.safetensors")
    assert torch.equal(*rows)


def test_continuing_with_other_prompts_or_settings_is_refused(pipe, tmp_path):
    collect(Job(pipe, captions(1), CALL, folder=tmp_path), STEPS)
    for change, told in (
        ({"prompts": captions(2, seed=9)}, r"^prompts=\['.*: statistics file .* with prompts=\["),
        ({"call": {**CALL, "guidance_scale": 1.0}}, "^guidance_scale=1.0: .*guidance_scale="),
        ({"seed": 4}, "^seed=4: statistics file .* was collected with seed=0; delete it or choose"),
    ):
        given = {"prompts": captions(1), "call": CALL, "folder": tmp_path, **change}
        with pytest.raises(LesaError, match=told):
            collect(Job(pipe, **given), STEPS)
    kept = Statistics.load(next(tmp_path.glob("*.safetensors")))
    kept.depends_on = {}  # as a file of an older lesa
    kept.save(tmp_path / f"statistics-{STEPS}.safetensors")
    with pytest.raises(LesaError, match="^folder='.* with other settings or another pipeline; "):
        collect(Job(pipe, captions(1), CALL, seed=4, folder=tmp_path), STEPS)


def test_statistics_of_another_scheduler_are_not_taken(pipe, tmp_path):
    collect(Job(pipe, captions(1), CALL, folder=tmp_path), STEPS)
    other = copy.copy(pipe)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=9.0)
    with pytest.raises(LesaError, match=r"^scheduler config=.*: statistics file .*; delete it"):
        collect(Job(other, captions(1), CALL, folder=tmp_path), STEPS)


def test_open_loop_coefficients_are_least_squares(statistics):
    judge = OpenLoop(statistics, history=2, ridge=0.0)
    indices, weights = judge.coefficients("cond", 7, (5, 3))
    root = torch.linalg.cholesky(
        statistics.mean("cond") + 1e-12 * torch.eye(statistics.size)
    ).T.numpy()
    exact = np.linalg.lstsq(root[:, indices], root[:, 7], rcond=None)[0]
    np.testing.assert_allclose(weights, exact, rtol=1e-3, atol=1e-5)


def test_candidates_are_of_every_first_gap_and_the_priors_own_comes_first(statistics):
    judge = judge_of(statistics, history=3)
    lists, known = candidates(judge, 5), shaped(5, statistics)
    assert known[0] == prior_schedule(5, STEPS, statistics.sigmas).full_steps
    assert sorted(lists) == sorted(known) and len(set(lists)) == len(lists)
    assert all(len(steps) == 5 and steps[0] == 0 and steps[-1] < STEPS for steps in lists)
    gaps = [first_gap(steps, STEPS) for steps in lists]
    assert lists[0] == next(x for x in known if not first_gap(x, STEPS))
    assert {*gaps[:4]} == {*gaps}
    for gap in {*gaps}:
        assert max((x for x in known if first_gap(x, STEPS) == gap), key=judge.quality) in lists[:4]
    best = search_schedule(statistics, 5).full_steps
    assert all(
        judge.quality(best) - handicap(best, STEPS) >= judge.quality(x) - handicap(x, STEPS)
        for x in lists
    )


def test_where_there_are_few_lists_all_are_candidates(statistics):
    assert comb(STEPS - 1, 1) <= ALL < comb(STEPS - 1, 4)
    assert set(shaped(2, statistics)) == {(0, step) for step in range(1, STEPS)}


@pytest.mark.parametrize("count", (1, 2, STEPS - 1, STEPS))
def test_search_of_few_and_of_nearly_all_steps(statistics, count):
    for steps in candidates(judge_of(statistics, 3), count):
        assert len(steps) == count and steps[0] == 0 and steps[-1] < STEPS


def test_the_objective_weighs_the_tail_and_is_between_mean_and_dB_of_the_mean_error():
    flat, spread = torch.full((10,), 30.0), torch.tensor([32.0] * 8 + [22.5] * 2)
    assert spread.mean() > flat.mean() and objective(spread) < objective(flat)
    assert objective(flat) == pytest.approx(30)
    error = -10 * torch.log10((10 ** (-spread / 10)).mean())
    assert error < objective(spread) < spread.mean()
    exact = (10 ** (-spread.double() / 40)).mean()
    assert objective(spread) == pytest.approx(float(-40 * torch.log10(exact)))


@pytest.mark.parametrize("count", (0, STEPS + 1))
def test_impossible_count_is_told(statistics, count):
    with pytest.raises(LesaError, match=f"full_steps={count}"):
        search_schedule(statistics, count)


def test_rollouts_are_what_the_engine_does(pipe):
    """The engine ends where a frozen rollout ended; a rollout of full steps is the base run."""
    job, schedule = Job(pipe, captions(2), CALL), Schedule.explicit((0, 2, 5, 9), STEPS)
    full = Schedule.every(1, STEPS)
    rollouts = [
        Rollout(RolloutSpec(schedule, 3, frozen=True)),
        Rollout(RolloutSpec(schedule, 3)),
        Rollout(RolloutSpec(full, 3)),
    ]
    run_rollouts(job, rollouts, reuse, STEPS)
    assert rollouts[2].result.score.min() > 80  # float32 noise of another batch size
    assert objective(rollouts[1].result.score) > objective(rollouts[0].result.score)
    plain = job.run(range(2), STEPS).double().flatten(1)
    with lesa.accelerate(pipe, lesa.Reuse(), schedule=schedule):
        fast = job.run(range(2), STEPS).double().flatten(1)
    score = -10 * torch.log10((plain - fast).square().mean(1) / plain.square().mean(1))
    torch.testing.assert_close(score, rollouts[0].result.score, rtol=0, atol=0.01)


@pytest.mark.parametrize("tap", ("output", "hidden"))
def test_rollouts_with_k_above_the_cached_features_fit_what_there_is(pipe, tap):
    job, schedule = Job(pipe, captions(2), CALL, tap), Schedule.explicit((0, 9), STEPS)
    rollout = Rollout(RolloutSpec(schedule, 3, uses_latent=tap == "output"))
    rows = 4 if tap == "output" else 3
    run_rollouts(job, [rollout], lambda *asked: reuse(*asked)[:, :rows], STEPS)
    assert torch.isfinite(rollout.result.score).all()
    assert not rollout.result.coefficients["cond"][5, 1:3].any()


@pytest.fixture(scope="module")
def trained(pipe):
    options = dict(call=CALL, refine=1, batch_size=2, progress=False)
    return lesa.train(pipe, captions(3), STEPS, (5, 4), **options)


def test_train_calibrates_every_count_and_beats_taylor(pipe, trained, tmp_path):
    assert sorted(len(plan.full_steps) for plan in trained.calibrated) == [4, 5]
    trained.save_pretrained(tmp_path / "forecaster")
    again = lesa.LesaForecaster.from_pretrained(tmp_path / "forecaster")
    job = Job(pipe, captions(3), CALL)
    plain = job.run(range(3), STEPS).double()

    def error(forecaster, **options):
        with lesa.accelerate(pipe, forecaster, **options):
            fast = job.run(range(3), STEPS).double()
            counted = lesa.stats(pipe)
        assert (counted.full, counted.skipped) == (5, STEPS - 5) and not counted.fallbacks
        return float((fast - plain).square().mean())

    shared = trained.schedule_for(5, STEPS)
    assert error(again, full_steps=5) == error(trained, full_steps=5)
    assert error(again, full_steps=5) < error(lesa.Taylor(order=1), schedule=shared)


@pytest.mark.parametrize(
    "form, more", [("paper", {"nodes": 16}), ("table", {}), ("paper", {"nodes": 8, "gate": "mlp"})]
)
def test_other_forms_train_and_run(pipe, form, more):
    options = dict(form=form, call=CALL, refine=0, progress=False)
    forecaster = lesa.train(pipe, captions(2), STEPS, 4, **options, **more)
    job = Job(pipe, captions(2), CALL)
    with lesa.accelerate(pipe, forecaster, full_steps=4):
        job.run(range(2), STEPS)
        counted = lesa.stats(pipe)
    assert (counted.full, counted.skipped) == (4, STEPS - 4) and not counted.fallbacks


def test_continuous_fit_nears_the_least_squares_bound(statistics):
    forecaster = lesa.LesaForecaster(num_steps=STEPS)
    before = fit_continuous(forecaster, [statistics], iterations=1)
    assert fit_continuous(forecaster, [statistics], iterations=250) < 0.7 * before


def test_drawn_steps_are_ordered_and_reach_step_zero_at_most():
    generator = torch.Generator().manual_seed(0)
    target, cached, valid = draw_steps(20, 3, 500, generator)
    chain = torch.cat([target[:, None], cached], 1)
    assert valid[:, 0].all() and (cached >= 0).all()
    assert ((chain[:, :-1] > chain[:, 1:]) | ~valid).all()
    assert (valid[:, 1:] <= valid[:, :-1]).all()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompts=[]), "prompts=.* not a list of non-empty strings"),
        (dict(prompts="a red circle"), "prompts=.* not a list"),
        (dict(full_steps=60), "full_steps=60 is more than num_inference_steps=50"),
        (dict(num_inference_steps=0), "num_inference_steps=0: not a whole number"),
        (dict(hihgt=64), "hihgt"),
    ],
)
def test_bad_input_is_told_in_a_sentence(pipe, options, message):
    given = {"prompts": captions(1), "num_inference_steps": 50, "full_steps": 10, **options}
    with pytest.raises(LesaError, match=message):
        lesa.train(pipe, progress=False, **given)


def test_call_arguments_are_told_from_fields(pipe):
    taken, fields = call_arguments(pipe, {"height": 64, "guidance_scale": 2.0, "stages": (0.5,)})
    assert taken == {"height": 64, "guidance_scale": 2.0} and fields == {"stages": (0.5,)}


def test_weights_hash_does_not_depend_on_dtype(pipe):
    from copy import deepcopy

    narrow = deepcopy(pipe.transformer).to(torch.bfloat16)
    assert weights_hash(narrow) == weights_hash(pipe.transformer)
    with torch.no_grad():
        narrow.proj_out.weight[0, 0] += 1
    assert weights_hash(narrow) != weights_hash(pipe.transformer)
