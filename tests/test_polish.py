"""Few-step models: Gauss-Newton over all coefficients on the final latent."""

from __future__ import annotations

import pytest
import torch
from test_training_pipelines import STEPS, make_job, reuse

from lesa.schedule import Schedule
from lesa.training import polish as polishing
from lesa.training.closed_loop import run_lanes
from lesa.training.lane import FixedLane, Lane, quality
from lesa.training.polish import polish


def test_a_step_solves_the_weighted_least_squares_of_a_linear_run(monkeypatch):
    """Errors that are linear in two coefficients: one step, float64 closed form."""
    torch.manual_seed(0)
    slopes, target = torch.randn(2, 3, 50).double(), torch.randn(3, 50).double()
    schedule = Schedule.explicit((0,), 3)
    monkeypatch.setattr(polishing, "DAMPING", 0.0)

    def at(first, second):
        rows = {"cond": torch.tensor([[0.0], [first], [second]]).double()}
        lane = FixedLane(schedule, 1, uses_latent=False, rows=rows)
        lane.error = first * slopes[0] + second * slopes[1] - target
        return lane

    here = at(0.3, -0.2)
    places = polishing._places(here)
    assert places == [("cond", 1, 0), ("cond", 2, 0)]
    moved = [at(0.3 + polishing.MOVE, -0.2), at(0.3, -0.2 + polishing.MOVE)]
    step = polishing._step(here, moved)
    weights = 1 / here.error.norm(dim=1)
    design = (slopes * weights[:, None]).flatten(1).T
    exact = torch.linalg.lstsq(design, (target * weights[:, None]).flatten()[:, None]).solution
    torch.testing.assert_close(torch.tensor([0.3, -0.2]).double() + step, exact[:, 0])
    tried = polishing._moved(here, dict(zip(places, step.tolist(), strict=True)))
    torch.testing.assert_close(tried.rows["cond"][1:, 0], exact[:, 0])
    assert here.rows["cond"][1, 0] == pytest.approx(0.3)  # left alone


@pytest.mark.parametrize(("name", "gain"), [("sdxl", 0.1), ("qwen", 0.5)])
def test_a_polished_lane_ends_nearer_to_the_base_run(name, gain):
    job = make_job(name)
    lane = Lane(Schedule.explicit((0, 2, 4), STEPS), 3, uses_latent=True)
    run_lanes(job, [lane], reuse(4), STEPS)
    better = polish(job, lane, STEPS)
    assert quality(better) > quality(lane) + gain
    again = FixedLane.of(better)
    run_lanes(job, [again], None, STEPS)  # what is stored gives the same run
    torch.testing.assert_close(again.score, better.score, rtol=1e-6, atol=1e-6)


def test_what_cannot_be_bettered_is_returned_as_it_was():
    job = make_job("sdxl")
    lane = Lane(Schedule.explicit(range(STEPS), STEPS), 3)
    run_lanes(job, [lane], reuse(4), STEPS)
    assert polish(job, lane, STEPS) is lane
