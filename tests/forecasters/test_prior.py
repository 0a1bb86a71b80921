"""The prior: full steps and damped lines that need no training."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import diffusers
import pytest
import torch

import lesa
from lesa import LesaConfig, LesaError, Prior, Schedule
from lesa.cli.run_generate import checked_schedule
from lesa.forecasters.prior import (
    Shape,
    default_count,
    own_shift,
    prior_schedule,
    quality_count,
    times,
)
from lesa.forecasters.reuse import Reuse

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "prior.json"


def flow(shift: float, steps: int) -> list[float]:
    """Levels of a flow schedule of this shift."""
    even = [1 - i / steps for i in range(steps + 1)]
    return [shift * u / (1 + (shift - 1) * u) for u in even]


def test_the_shape_is_what_the_fit_found():
    assert asdict(Shape()) == json.loads(RESULT.read_text())["shape"]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 20, 28, 50, 100])
@pytest.mark.parametrize("shift", [None, 1.0, 3.0, 12.0])
def test_every_count_has_a_list(steps, shift):
    levels = [] if shift is None else flow(shift, steps)
    for count in range(1, steps + 1):
        schedule = prior_schedule(count, steps, levels)
        assert len(schedule.full_steps) == count and schedule.steps == steps
        table = Prior().table(schedule, levels)
        assert torch.allclose(
            table.coefficients.sum(1)[list(schedule.skipped_steps)],
            torch.ones(steps - count).double(),
        )


def test_full_steps_are_dense_at_both_ends_and_none_follows_the_first():
    full = prior_schedule(10, 50, flow(3, 50)).full_steps
    gaps = [after - before for before, after in pairwise((*full, 50))]
    middle = max(gaps)
    assert gaps[0] < gaps[1] < middle and gaps[-1] < gaps[-2] < middle and gaps[0] > 1


def test_the_list_goes_by_noise_level():
    """Where a schedule takes most of its steps at high noise, so do the full ones."""
    levels = flow(3, 50), flow(12, 50)
    reached = [[known[s] for s in prior_schedule(10, 50, known).full_steps] for known in levels]
    for one, other in zip(*reached, strict=True):
        assert abs(one - other) < 0.1  # a step of the second one at low noise
    assert prior_schedule(10, 50, levels[0]) != prior_schedule(10, 50, levels[1])


@pytest.mark.parametrize(("shift", "taken"), [(1.0, 2.5), (1.6, 2.56), (2.5, 4.0), (7.0, 5.0)])
def test_a_small_shift_is_found_and_nearly_kept(shift, taken):
    for levels in (flow(shift, 50), flow(shift, 51), flow(shift, 50)[15:]):  # img2img begins late
        assert own_shift(levels) == pytest.approx(shift)
        assert Shape().shift_on(levels) == pytest.approx(taken)
    early, late = (prior_schedule(10, 50, flow(known, 50)).full_steps for known in (1.6, 3.1))
    assert max(abs(a - b) for a, b in zip(early, late, strict=True)) <= 1  # the same share of a run


def test_levels_of_other_schedules_have_no_shift():
    karras = [((1 - i / 50) + 0.02 ** (1 / 7) * i / 50) ** 7 for i in range(50)]
    for levels in ([], [1.0, 0.0], [*karras, 0.0], [1 - (i / 50) ** 3 for i in range(51)]):
        assert own_shift(levels) is None and Shape().shift_on(levels) == Shape().shift


def test_even_steps_of_its_own_shift_are_even_in_time():
    shift = Shape().shift
    assert times(8, flow(shift, 8), shift) == pytest.approx(times(8, (), shift))


def test_a_line_is_damped_at_high_noise_and_over_wide_gaps():
    def weight(full: list[int], step: int) -> float:
        row = Prior().table(Schedule.explicit(full, 50)).coefficients[step]
        last, before = [s for s in full if s < step][-1:-3:-1]
        return float(-row[1]) * (last - before) / (step - last)

    early, late = weight([0, 2, 6, 40, 44], 4), weight([0, 2, 38, 42, 46], 44)
    assert 0 < early < late
    assert weight([0, 10, 20, 30, 40], 25) < 0.5 * weight([0, 20, 24, 28, 32, 40], 26)


def test_samplers_that_extrapolate_get_less_of_a_line_and_those_with_noise_reuse():
    schedule = Schedule.explicit([0, 3, 7, 12], 20)
    plain = Prior().table(schedule).coefficients
    multistep = Prior().table(schedule, multistep=True).coefficients
    lines = plain[:, 1] / Prior(Shape(width=1e9)).table(schedule).coefficients[:, 1]  # damping
    cubes = (1 / lines - 1) * (Shape().width / 0.1) ** 3
    expected = 2 / 3 / (1 + cubes) / lines * plain[:, 1]
    skipped = [*schedule.skipped_steps][2:]  # the first gap has one feature
    assert torch.allclose(multistep[skipped, 1], expected[skipped])
    assert (multistep[:, 1].abs() < 0.67 * plain[:, 1].abs() + 1e-12).all()
    noise = Prior().table(schedule, noise=True).coefficients
    assert torch.equal(noise[:, :1], Reuse().table(schedule).coefficients)
    assert not noise[:, 1].any()


def test_the_default_is_a_fifth_and_more_in_short_runs():
    assert [default_count(n) for n in (100, 50, 40, 28, 20, 8, 4, 2, 1)] == [
        20, 10, 10, 10, 8, 4, 2, 1, 1
    ]  # fmt: skip
    for steps in (1, 4, 28, 50):
        found = LesaConfig().bound_schedule(steps)
        assert found == prior_schedule(default_count(steps), steps)
    assert checked_schedule(Prior(), {}, 50) == {"full_steps": 10}
    counts = [quality_count(50, quality) for quality in ("best", "balanced", "fast")]
    assert counts == [13, 10, 8]
    chosen = LesaConfig(quality="fast").choice(50)
    assert len(chosen.schedule.full_steps) == 8 and "untrained" in chosen.why


def test_its_own_shape_makes_its_own_list():
    dense = Prior(replace(Shape(), early=2.0))
    assert LesaConfig(dense, full_steps=10).bound_schedule(50) != prior_schedule(10, 50)


@pytest.mark.parametrize("count", [0, 51, 2.5])
def test_a_count_that_the_run_does_not_have(count):
    with pytest.raises(LesaError, match="^full_steps="):
        prior_schedule(count, 50)


def test_levels_that_rise_are_refused():
    with pytest.raises(LesaError, match="do not strictly decrease"):
        prior_schedule(2, 3, [0.0, 0.3, 0.6, 1.0])


def test_the_engine_tells_it_of_the_sampler(tiny_flux, inputs):
    """Two runs of the same levels, of which one is a multistep sampler's."""
    told = []

    class Told(Prior):
        def table(self, *args, **options):
            if options:  # else `enable` asks whether it needs levels
                told.append(options)
            return super().table(*args, **options)

    own = tiny_flux.scheduler
    for name, more in (
        ("FlowMatchEulerDiscreteScheduler", {}),
        (
            "UniPCMultistepScheduler",
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        ),
    ):
        tiny_flux.scheduler = getattr(diffusers, name).from_config(own.config, **more)
        with lesa.accelerate(tiny_flux, Told()):
            tiny_flux(**inputs())
            assert lesa.stats(tiny_flux).skipped
    assert told == [{"multistep": False, "noise": False}, {"multistep": True, "noise": False}]
