"""Who computes what, for rollouts that begin alike."""

from __future__ import annotations

from dataclasses import replace

import torch

from lesa.core.schedule import Schedule
from lesa.training.prefixes import Prefixes, parting
from lesa.training.rollout import Rollout, RolloutSpec, Visit


def spec(*full, **more):
    return RolloutSpec(Schedule.explicit(full, 8), 3, **more)


def test_lists_part_at_the_first_step_that_only_one_computes():
    assert parting(spec(0, 3, 5), spec(0, 3, 6)) == 5
    assert parting(spec(0, 3), spec(0, 3, 6)) == 6
    assert parting(spec(0, 3), spec(0, 3)) == 8


def test_other_settings_part_at_the_first_forecast():
    assert parting(spec(0, 1, 4), spec(0, 1, 4, drift=1.0)) == 2
    rows = {"cond": torch.zeros(8, 4)}
    fixed = spec(0, 1, 4, frozen=True, rows=rows)
    assert parting(spec(0, 1, 4), fixed) == 2
    moved = {"cond": rows["cond"].clone()}
    moved["cond"][4, 0] = 1  # of a full step: nobody reads it
    assert parting(fixed, replace(fixed, rows=moved)) == 8
    moved["cond"][6, 0] = 1
    assert parting(fixed, replace(fixed, rows=moved)) == 6


def test_a_full_step_is_computed_once_and_by_somebody_who_still_runs():
    prefixes = Prefixes([spec(0, 3, 5), spec(0, 3, 6), spec(0, 4)])
    assert [prefixes.computed(step) for step in range(8)] == [[0], [], [], [0], [2], [0], [1], []]
    assert [prefixes.source(copy, 3) for copy in range(3)] == [0, 0, 2]
    prefixes.drop([0])
    assert prefixes.computed(3) == [1] and prefixes.computed(5) == []
    assert prefixes.source(0, 3) is None and prefixes.source(1, 5) == 1


def test_rollouts_of_other_widths_share_full_steps():
    """Nothing of their rows is taken over at a full step."""
    plan = Schedule.explicit((0, 2), 4)
    mine, theirs = (Rollout(RolloutSpec(plan, 3, uses_latent=latent)) for latent in (False, True))
    for rollout, width in ((mine, 3), (theirs, 4)):
        rollout.start("cond", torch.ones(4, width), parts=1)
    mine.follow(theirs, Visit(2, "cond"))
    assert mine.result.coefficients["cond"].shape == (4, 3)
