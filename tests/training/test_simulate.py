"""The simulation against lock-step runs of a model that does not answer to the latent's error."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from training_jobs import STEPS, make_job, reuse

from lesa.core.schedule import Schedule
from lesa.training import closed_loop
from lesa.training.closed_loop import run_rollouts
from lesa.training.collect import collect
from lesa.training.rollout import Rollout, RolloutSpec
from lesa.training.search import OpenLoop, first_gap, handicap, judge_of
from lesa.training.simulate import STEERING, Simulation

LISTS = [(0, 2, 4), (0, 3), (0, 1, 2), (0, 1, 5), (0,)]


def deaf(monkeypatch, job):
    """Full steps give the plain run's outputs, wherever the latents are."""
    compute, followed, lock = closed_loop.LockStep._compute, closed_loop.followed, {}

    def seen(denoiser, kwargs):
        lock["step"] = followed(denoiser, kwargs)
        return lock["step"]

    def kept(self, batch, branch, rows):
        kind, output, feature = compute(self, batch, branch, rows)
        step = lock["step"]
        _, base = self.base.at(step.index, branch, self.which, output.device)
        copies = len(self.rollouts)
        parts = base[:, None].expand(-1, copies, *base.shape[1:])
        return kind, parts.flatten(0, 2).clone(), parts.flatten(0, 2).clone()

    monkeypatch.setattr(closed_loop, "followed", seen)
    monkeypatch.setattr(closed_loop.LockStep, "_compute", kept)


@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_it_predicts_runs_in_which_the_model_does_not_answer(name, monkeypatch):
    job = make_job(name)
    statistics = collect(job, STEPS)
    simulation = Simulation(statistics, 3, ridge=1e-9)
    deaf(monkeypatch, job)
    spec = RolloutSpec(Schedule.explicit((0,), STEPS), 3, drift=STEERING, ridge=1e-9)
    rollouts = [Rollout(replace(spec, schedule=Schedule.explicit(x, STEPS))) for x in LISTS]
    run_rollouts(job, rollouts, reuse(4), STEPS, statistics)
    for full_steps, rollout in zip(LISTS, rollouts, strict=True):
        np.testing.assert_allclose(
            simulation.scores(full_steps), rollout.result.score.numpy(), atol=0.3
        )


def test_order_of_the_questions_does_not_matter(monkeypatch):
    """States of common beginnings are shared, and forgotten where there are many."""
    statistics = collect(make_job("flux"), STEPS)
    alone = [Simulation(statistics, 3).scores(x) for x in LISTS]
    together = Simulation(statistics, 3)
    monkeypatch.setattr("lesa.training.simulate.KEPT", 2 * STEPS)
    for _ in range(2):
        for full_steps, wanted in zip(LISTS, alone, strict=True):
            np.testing.assert_array_equal(together.scores(full_steps), wanted)


def test_without_latents_the_open_loop_judges():
    job = replace(make_job("flux"), tap="hidden")
    assert isinstance(judge_of(collect(job, STEPS), 3), OpenLoop)
    assert isinstance(judge_of(collect(make_job("flux"), STEPS), 3), Simulation)


def test_a_late_second_full_step_has_a_handicap():
    seconds = (1, 2, 3, 6, 7, 20)
    assert [first_gap((0, second, 40), 50) for second in seconds] == [0, 0, 1, 1, 2, 2]
    assert [handicap((0, second, 40), 50) for second in seconds] == [0, 0, 1, 1, 1, 1]
    assert handicap((0, 1), 4) == 0 and handicap((0, 2), 4) == 1 and handicap((0,), 50) == 0
