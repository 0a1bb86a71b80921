"""Prompts that nothing is fitted to: they judge, and change no coefficient."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from training_jobs import STEPS, make, make_job, reuse

import lesa
from lesa.core.schedule import Schedule
from lesa.forecasters.worth import Worth
from lesa.training import aims, calibrate
from lesa.training.calibrate import DECISIVE, FINALISTS, Calibrator
from lesa.training.closed_loop import replay, run_rollouts
from lesa.training.collect import collect
from lesa.training.job import Job
from lesa.training.objective import quality
from lesa.training.rollout import Rollout, RolloutSpec
from lesa.training.search import first_gap, handicap
from lesa.util.progress import Progress

PLAN = Schedule.explicit((0, 2, 4), STEPS)


def fitted(job, tap="output", **more):
    rollout = Rollout(RolloutSpec(PLAN, 3, uses_latent=tap == "output"))
    run_rollouts(job, [rollout], reuse(4 if tap == "output" else 3), STEPS, **more)
    return rollout


@pytest.mark.parametrize(
    ("name", "tap"), [("qwen", "output"), ("sdxl", "output"), ("flux", "hidden")]
)
def test_rows_are_those_of_the_other_prompts_alone(name, tap):
    whole = replace(make_job(name, prompts=4), tap=tap)
    collect(whole, STEPS)
    alone = fitted(whole, tap, prompts=[0, 1, 3])
    beside = fitted(replace(whole, held_out=frozenset([2])), tap)
    for branch, rows in alone.result.coefficients.items():
        near = dict(rtol=1e-2, atol=1e-2) if tap == "hidden" else dict(rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(beside.result.coefficients[branch], rows, **near)
    assert len(beside.result.score) == 4 and len(alone.result.score) == 3
    changed = fitted(whole, tap)
    assert not all(
        torch.allclose(rows, changed.result.coefficients[branch], rtol=1e-3, atol=1e-4)
        for branch, rows in alone.result.coefficients.items()
    )


def test_races_put_the_best_list_first_and_late_second_steps_back():
    job = make_job("qwen", prompts=4)
    statistics = collect(job, STEPS)
    forecaster = lesa.LesaForecaster(
        "table", branches=statistics.branches, num_steps=STEPS, uses_latent=True
    )
    calibrator = Calibrator(job, forecaster, statistics)
    lists = [(0, 2, 4), (0, 1, 2), (0, 1, 5), (0, 3, 5)]
    rollouts = [calibrator._rollout(Schedule.explicit(x, STEPS)) for x in lists]
    run_rollouts(job, rollouts, calibrator._prior, STEPS, statistics)
    ahead = {
        x: quality(rollout) - handicap(x, STEPS) for x, rollout in zip(lists, rollouts, strict=True)
    }
    assert calibrator._ranked(lists, 1e6) == sorted(lists, key=ahead.__getitem__, reverse=True)
    assert calibrator._ranked(lists, 1) is None and calibrator.race(lists, 1) == lists
    before = job.work.rows
    found = calibrator.race(lists, 1e6)
    assert found == calibrator._ranked(found, 1e6)
    assert job.work.rows > before


def test_the_best_list_of_each_first_gap_is_in_the_second_race(monkeypatch):
    """Where that has enough prompts; else those with an early second full step race alone."""
    job = make_job("flux", prompts=DECISIVE)
    statistics = collect(job, STEPS)
    calibrator = Calibrator(job, lesa.LesaForecaster("table", num_steps=STEPS), statistics)
    lists = [(0, 1, 2), (0, 1, 3), (0, 1, 4), (0, 1, 5), (0, 2, 4), (0, 3, 5), (0, 2, 3)]
    races = []

    def ranked(lists, budget):
        races.append([*lists])
        return [*lists]

    monkeypatch.setattr(calibrator, "_ranked", ranked)
    calibrator.race(lists, 2 * FINALISTS * 3 * DECISIVE)
    gaps = [first_gap(x, STEPS) for x in races[1]]
    assert races[0] == lists and races[1][0] == (0, 1, 2) and len(races[1]) == FINALISTS
    assert {*gaps} == {first_gap(x, STEPS) for x in lists} and (0, 1, 5) not in races[1]
    calibrator.race(lists, 2 * FINALISTS * 3 * DECISIVE - 1)
    assert races[2] == races[3] == lists[:4]
    calibrator.race(lists[1:], 1.0)
    assert races[4] == lists[1:]  # too few of them


def test_a_replayed_plain_run_is_the_plain_run():
    job = make_job("sdxl", num_images_per_prompt=2)
    collect(job, STEPS)
    rollout = fitted(job)
    before = job.work.rows
    pictures = replay(job, rollout.fixed(), 1)
    assert job.work.rows - before == job.rows(len(PLAN.full_steps), 1)
    plain = job.run([1], STEPS, output_type="pt")
    torch.testing.assert_close(pictures[:2], plain, rtol=0, atol=2e-3)
    assert not torch.allclose(pictures[2:], plain, rtol=0, atol=2e-3)


def test_rollouts_that_do_not_fit_into_memory_run_one_after_the_other(monkeypatch):
    job = make_job("qwen", prompts=2)
    collect(job, STEPS)
    lists = [(0, 2, 4), (0, 3), (0, 1, 5)]

    def scores():
        rollouts = [Rollout(RolloutSpec(Schedule.explicit(x, STEPS), 3)) for x in lists]
        run_rollouts(job, rollouts, reuse(4), STEPS)
        return torch.stack([rollout.result.score for rollout in rollouts])

    calls, run = [], type(job).run
    monkeypatch.setattr(type(job), "run", lambda *a, **k: calls.append(len(a[1])) or run(*a, **k))
    together = scores()
    each = 2 * job.work.bytes_of(3)
    monkeypatch.setattr("lesa.training.closed_loop.free_memory", lambda device: 2 * each / 0.4 + 1)
    torch.testing.assert_close(scores(), together, rtol=1e-4, atol=1e-3)
    assert calls == [6, 4, 2]


@pytest.mark.parametrize("validation", [2, None])
def test_a_list_is_worth_what_the_engine_makes_of_prompts_that_judge(validation):
    """Those held out where somebody says which, else also fitted ones that the budget pays for."""
    pipe, call = make("sdxl", prompts=8)
    more = dict(call=call, form="table", progress=False, validation=validation)
    trained = lesa.train(pipe, None, STEPS, 3, **more)
    (entry,) = trained.calibrations
    worth, judged = entry.worth, [3, 7] if validation else [*range(8)]
    assert worth.pictures == len(judged) and worth.share > 0
    assert worth.validated
    job = Job(pipe, [f"prompt {i}" for i in range(8)], call)
    plain = job.run(judged, STEPS, output_type="pt")
    with lesa.accelerate(pipe, trained, full_steps=3):
        fast = job.run(judged, STEPS, output_type="pt")
    found = -10 * torch.log10((plain.double() - fast.double()).square().flatten(1).mean(1))
    assert worth.mean == pytest.approx(float(found.mean()), abs=0.2)
    assert worth.minimum == pytest.approx(float(found.min()), abs=0.2)


def test_many_prompts_are_asked_before_a_late_second_step_is_taken(monkeypatch):
    job = make_job("qwen", prompts=4)
    statistics = collect(job, STEPS)
    forecaster = lesa.LesaForecaster(
        "table", branches=statistics.branches, num_steps=STEPS, uses_latent=True
    )
    calibrator = Calibrator(job, forecaster, statistics)
    late, early = calibrator.fit([(0, 3, 5)], 0), calibrator.fit([(0, 1, 5)], 0)
    lists = [(0, 3, 5), (0, 1, 5), (0, 1, 2)]
    spent = job.spent
    assert calibrator.insured(late, lists, 12) is late  # there are four
    monkeypatch.setattr(calibrate, "MANY", 4)
    assert calibrator.insured(early, lists, 12) is early
    assert calibrator.insured(late, [(0, 3, 5)], 12) is late and job.spent == spent
    assert calibrator.insured(late, lists, 11) is late and job.spent == spent  # nor paid for
    for score, expected in ((50.0, (0, 1, 5)), (-50.0, (0, 3, 5))):
        one = calibrator.fit([(0, 1, 5)], 0)
        one.result.error = one.result.error * 0 + 10 ** (-score / 20)
        with monkeypatch.context() as patch:
            patch.setattr(calibrator, "fit", lambda lists, _, one=one: one)
            assert calibrator.insured(late, lists, 12).spec.schedule.full_steps == expected
    late.result.error = late.result.error * 0 + 10 ** (-quality(early) / 20)
    found = calibrator.insured(late, lists, 12)  # as good, so that it is behind by the handicap
    assert found.spec.schedule.full_steps == (0, 1, 5)
    assert job.spent > spent


def test_an_interrupt_leaves_the_best_so_far(monkeypatch):
    pipe, call = make("flux", prompts=2)
    told = Progress(quiet=True)
    options = dict(call=call, form="table", validation=0, progress=told)

    def stop(*args):
        raise KeyboardInterrupt

    whole = lesa.train(pipe, None, STEPS, (3, 2), **options)
    for place in ("Calibrator.race", "Calibrator.joint_fit", "measure"):
        with monkeypatch.context() as patch:
            patch.setattr(f"lesa.training.aims.{place}", stop)
            early = lesa.train(pipe, None, STEPS, (3, 2), **options)
        assert sorted(len(plan.full_steps) for plan in early.calibrated) == [2, 3]
        assert "interrupted: the forecaster holds what was found so far" in told.lines
    assert {entry.worth is None for entry in whole.calibrations} == {False}
    monkeypatch.setattr("lesa.training.aims.collect", stop)
    with pytest.raises(KeyboardInterrupt):
        lesa.train(pipe, None, STEPS, 3, **options)


@pytest.mark.parametrize("schedule", [None, lesa.Schedule.explicit((0, 3), STEPS)])
def test_an_interrupt_of_the_fit_on_plain_runs_keeps_what_they_say(schedule, monkeypatch):
    def stop(*args, **more):
        raise KeyboardInterrupt

    pipe, call = make("flux", prompts=2)
    told = Progress(quiet=True)
    monkeypatch.setattr(sys.modules["lesa.training.train"], "fit_continuous", stop)
    options = dict(call=call, validation=0, progress=told, schedule=schedule)
    early = lesa.train(pipe, None, STEPS, 2, **options)
    (plan,) = early.calibrated
    assert len(plan.full_steps) == 2 and early.metadata["interrupted"]
    assert "interrupted: the forecaster holds what was found so far" in told.lines
    assert "cost: 1.0 plain generations per prompt, 2 in all" in told.lines


def test_a_budget_is_held_where_a_target_is_searched():
    pipe, call = make("flux", prompts=4)
    told = Progress(quiet=True)
    options = dict(call=call, form="table", validation=1, progress=told)
    lesa.train(pipe, None, STEPS, 2, target_psnr=100, budget=8, **options)
    (cost,) = [line for line in told.lines if line.startswith("cost:")]
    assert float(cost.split(", ")[1].split()[0]) <= 8
    assert any("is the nearest to 100 dB" in line for line in told.lines)


def test_the_smallest_number_of_full_steps_that_holds_a_target_is_found(monkeypatch):
    """Against every number calibrated one by one."""
    pipe, call = make("sdxl", prompts=2)
    options = dict(call=call, form="table", validation=0, progress=False)
    counts = range(1, STEPS)
    p10 = {}
    for count in counts:
        (entry,) = lesa.train(pipe, None, STEPS, count, **options).calibrations
        p10[count] = entry.worth.p10
    target = sorted(p10.values())[2] - 0.1
    smallest = min(count for count in counts if p10[count] >= target)
    for first in counts:
        trained = lesa.train(pipe, None, STEPS, first, target_psnr=target, **options)
        found = [len(plan.full_steps) for plan in trained.calibrated]
        assert min(found) == smallest and all(p10[count] >= target for count in found)


def test_a_target_out_of_reach_leaves_the_nearest(monkeypatch):
    pipe, call = make("sdxl", prompts=2)
    told = Progress(quiet=True)
    options = dict(call=call, form="table", validation=0, polish=0, progress=told)
    monkeypatch.setattr(aims, "measure", lambda *_: Worth.of([30.0], validated=False))
    trained = lesa.train(pipe, None, STEPS, 3, target_psnr=100, **options)
    assert any("is the nearest to 100 dB at p10 (30.0)" in line for line in told.lines)
    assert max(len(plan.full_steps) for plan in trained.calibrated) == STEPS - 1


def test_a_quarter_of_some_prompts_is_held_out_as_of_all():
    job = replace(make_job("flux", prompts=8), held_out=frozenset([3, 7]))
    some = {count: job.mixed(count) for count in (1, 4, 7, 8, 20)}
    assert some[1] == [3] and some[4] == [0, 1, 2, 3]
    assert some[7] == [0, 1, 2, 3, 4, 5, 7] and some[8] == some[20] == [*range(8)]
    assert replace(job, held_out=frozenset()).mixed(2) == [0, 1]
