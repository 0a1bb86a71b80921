"""Gauss-Newton over the coefficients of all gaps on the final latent."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from training_jobs import STEPS, make_job, reuse

from lesa.core.schedule import Schedule
from lesa.training import closed_loop
from lesa.training import joint_fit as fitting
from lesa.training.closed_loop import run_rollouts
from lesa.training.joint_fit import joint_fit
from lesa.training.objective import quality
from lesa.training.rollout import Rollout, RolloutSpec
from lesa.util.progress import Progress

UNLIMITED = 1e9
LATE = tuple(0.8 * (1 - step / STEPS) for step in range(STEPS + 1))  # no step at high noise


def test_a_step_solves_the_least_squares_of_a_linear_run():
    """Errors that are linear in two coefficients: one step, float64 closed form."""
    torch.manual_seed(0)
    slopes, target = torch.randn(2, 3, 50).double(), torch.randn(3, 50).double()
    schedule = Schedule.explicit((0, 2), 4)

    def at(first, second):
        rows = {"cond": torch.tensor([[0.0], [first], [0.0], [second]]).double()}
        rollout = Rollout(RolloutSpec(schedule, 1, uses_latent=False, rows=rows, frozen=True))
        rollout.result.error = first * slopes[0] + second * slopes[1] - target
        return rollout

    here = at(0.3, -0.2)
    places = fitting._places(here, LATE)
    assert places == [("cond", 1, 0), ("cond", 3, 0)]
    step = fitting._step(here.result.error, slopes, damping=0.0)
    exact = torch.linalg.lstsq(slopes.flatten(1).T, target.flatten()[:, None]).solution
    torch.testing.assert_close(torch.tensor([0.3, -0.2]).double() + step, exact[:, 0])
    tried = fitting._moved(here, places, step)
    torch.testing.assert_close(tried.spec.rows["cond"][1::2, 0], exact[:, 0])
    assert here.spec.rows["cond"][1, 0] == pytest.approx(0.3)  # left alone


@pytest.mark.parametrize(("name", "gain"), [("sdxl", 0.1), ("qwen", 0.5)])
def test_a_jointly_fitted_rollout_ends_nearer_to_the_base_run(name, gain):
    job = make_job(name)
    rollout = Rollout(RolloutSpec(Schedule.explicit((0, 2, 4), STEPS), 3, uses_latent=True))
    run_rollouts(job, [rollout], reuse(4), STEPS)
    better = joint_fit(job, rollout, LATE, 2, UNLIMITED)
    assert quality(better) > quality(rollout) + gain
    again = better.fixed()
    run_rollouts(job, [again], None, STEPS)  # what is stored gives the same run
    torch.testing.assert_close(again.result.score, better.result.score, rtol=1e-6, atol=1e-6)


def test_some_of_the_prompts_run_as_they_do_among_all():
    job = make_job("qwen", prompts=3)
    fitted = Rollout(RolloutSpec(Schedule.explicit((0, 2, 4), STEPS), 3, uses_latent=True))
    run_rollouts(job, [fitted], reuse(4), STEPS)
    rollout = fitted.fixed()
    run_rollouts(job, [rollout], None, STEPS)
    everyone = rollout.result.error
    run_rollouts(job, [rollout], None, STEPS, prompts=(0, 2))
    torch.testing.assert_close(rollout.result.error, everyone[[0, 2]], rtol=1e-5, atol=1e-6)


def test_derivatives_are_taken_on_the_fitted_prompts_in_turn_as_the_budget_pays(monkeypatch):
    seen, judged, slopes, run = [], [], fitting._slopes, fitting.run_rollouts

    def watched(*args):
        seen.append(list(args[-1]))
        return slopes(*args)

    def running(*args, prompts):
        judged.append(list(prompts))
        return run(*args, prompts=prompts)

    monkeypatch.setattr(fitting, "_slopes", watched)
    monkeypatch.setattr(fitting, "run_rollouts", running)
    job = replace(make_job("sdxl", prompts=4), held_out=frozenset([1]))
    rollout = Rollout(RolloutSpec(Schedule.explicit((0, 2, 4), STEPS), 3, uses_latent=True))
    run_rollouts(job, [rollout], reuse(4), STEPS)
    each = fitting._slope_steps(rollout.fixed(), fitting._places(rollout.fixed(), LATE))
    budget = 2 * each + 4 * 4 * len(rollout.spec.schedule.full_steps)  # of a round
    monkeypatch.setattr(fitting, "DERIVATIVES", (2 * each + 0.5) / budget)
    assert quality(joint_fit(job, rollout, LATE, 2, 2 * budget)) >= -100
    assert seen == [[0, 2], [3, 0]]
    assert set(judged[-1]) == {0, 1, 2, 3}
    seen.clear()
    assert joint_fit(job, rollout, LATE, 1, 0.1 * each) is rollout and not seen
    assert joint_fit(job, rollout, LATE, 1, 2 * each + 1) is rollout and not seen  # nobody judges


def test_as_many_rounds_run_as_are_paid_for_and_fewer_are_told(monkeypatch):
    turns, some = [], fitting._some

    def watched(fitted, count, turn):
        turns.append(turn)
        return some(fitted, count, turn)

    monkeypatch.setattr(fitting, "_some", watched)
    job = replace(make_job("qwen", prompts=4), progress=Progress(quiet=True))
    rollout = Rollout(RolloutSpec(Schedule.explicit((0, 2, 4), STEPS), 3, uses_latent=True))
    run_rollouts(job, [rollout], reuse(4), STEPS)
    here = rollout.fixed()
    places = fitting._places(here, LATE)
    least = next(n for n in range(1, 1000) if fitting._plan(job, here, places, n))
    for rounds, paid, told in ((3, 2, "2 rounds"), (2, 1, "1 round"), (10**9, 2, "2 rounds")):
        job.progress.lines.clear()
        turns.clear()
        assert joint_fit(job, rollout, LATE, rounds, paid * least) is not rollout
        assert turns == [*range(paid)]
        assert job.progress.lines[0] == (
            f"polish={rounds}: the budget pays for {told} of the joint fit at 3 of 6 steps in full"
        )
    job.progress.lines.clear()
    joint_fit(job, rollout, LATE, 2, 2 * least)
    assert not any("polish" in line for line in job.progress.lines)
    assert joint_fit(job, rollout, LATE, 1, least - 1) is rollout
    assert "polish=1: the budget pays for no rounds" in job.progress.lines[-1]
    joint_fit(job, rollout, LATE, 0, least)
    assert sum("polish" in line for line in job.progress.lines) == 1


def test_a_small_budget_pays_for_the_longest_gaps():
    schedule = Schedule.explicit((0, 2, 4, 5), 10)
    rows = {branch: torch.zeros(10, 2).double() for branch in ("cond", "uncond")}
    here = Rollout(RolloutSpec(schedule, 1, uses_latent=True, rows=rows, frozen=True))
    levels = [0.8 * (1 - step / 10) for step in range(11)]
    places = fitting._places(here, levels)
    assert {place[1] for place in places} == {1, 3, 9}
    whole = fitting._slope_steps(here, places)
    assert fitting._affordable(here, places, whole) == places
    fewer = fitting._affordable(here, places, whole - 1)
    assert fewer == [place for place in places if place[1] != 1]
    least = fitting._affordable(here, places, fitting._slope_steps(here, fewer) - 1)
    assert {place[:2] for place in least} == {("cond", 9), ("uncond", 9)}
    assert not fitting._affordable(here, places, 0)


def test_only_the_last_row_of_a_gap_is_moved_and_none_at_high_noise():
    rows = {"cond": torch.zeros(8, 3)}
    rollout = Rollout(
        RolloutSpec(Schedule.explicit((0, 1, 5), 8), 2, uses_latent=True, rows=rows, frozen=True)
    )
    late = [("cond", 7, c) for c in (0, 1, 2)]
    sigmas = [1.0, 0.97, 0.95, 0.92, 0.85, 0.8, 0.5, 0.2, 0.0]
    assert fitting._places(rollout, sigmas) == [("cond", 4, c) for c in (0, 1, 2)] + late
    assert fitting._places(rollout, [*sigmas[:4], 0.86, *sigmas[5:]]) == late


@pytest.mark.parametrize("name", ["sdxl", "qwen"])
def test_what_rollouts_have_in_common_is_computed_once(name, monkeypatch):
    """The same end as a run of its own, and fewer model calls."""
    rows, compute = [], closed_loop.Batch.compute

    def counted(self, chosen, job, known):
        rows.append(len(chosen))
        return compute(self, chosen, job, known)

    job = make_job(name)
    fitted = Rollout(RolloutSpec(Schedule.explicit((0, 2, 4), STEPS), 3, uses_latent=True))
    run_rollouts(job, [fitted], reuse(4), STEPS)
    first = fitted.fixed()
    place = (next(iter(first.spec.rows)), 3, 0)
    other = fitting._moved(first, [place], torch.tensor([0.1]))
    run_rollouts(job, [other], None, STEPS)
    wanted = other.result.error
    monkeypatch.setattr(closed_loop.Batch, "compute", counted)
    run_rollouts(job, [first, other], None, STEPS)
    assert not torch.allclose(wanted, first.result.error)
    torch.testing.assert_close(other.result.error, wanted, rtol=1e-5, atol=1e-6)
    assert sum(rows) == (3 + 1) * len(job.prompts) * 2  # guidance doubles every picture
