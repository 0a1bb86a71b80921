"""One rule of full steps for each training-free method, whoever asks for it."""

from __future__ import annotations

import pytest

from lesa import FoCa, HiCache, LesaConfig, LesaForecaster, Reuse, Spectrum, Taylor
from lesa.cli.inputs import load_forecaster
from lesa.cli.run_generate import checked_schedule
from lesa.core.schedule import Schedule
from lesa.evaluation import build
from lesa.evaluation.method import Bench
from lesa.forecasters.published import ALIASES, METHODS, canonical, rule_of

TAYLORSEER_10 = (0, 1, 2, 8, 14, 20, 26, 32, 38, 44)


def test_taylor_follows_taylorseers_rule():
    config = LesaConfig(Taylor(order=1), full_steps=10)
    assert config.bound_schedule(50).full_steps == TAYLORSEER_10
    cache = checked_schedule("taylorseer-1", {"full_steps": 10}, 50)
    config = LesaConfig(load_forecaster("taylorseer-1"), **cache)
    assert config.bound_schedule(50).full_steps == TAYLORSEER_10


@pytest.mark.parametrize("name", [*METHODS, *ALIASES])
@pytest.mark.parametrize(("count", "steps"), [(10, 50), (8, 50), (13, 50), (3, 8)])
def test_the_library_generate_and_compare_have_the_same_full_steps(name, count, steps):
    forecaster = load_forecaster(name)
    library = LesaConfig(forecaster, full_steps=count).bound_schedule(steps)
    cache = checked_schedule(name, {"full_steps": count}, steps)
    command = LesaConfig(forecaster, **cache).bound_schedule(steps)
    contender = build(name, count, Bench(steps))
    assert library == command == contender.schedule
    assert type(contender.forecaster) is type(forecaster)
    assert contender.name == canonical(name) in METHODS


@pytest.mark.parametrize("order", range(3))
def test_a_forecaster_is_called_as_its_method_is(order):
    assert Taylor(order).name in METHODS
    assert canonical(HiCache().name) == "hicache" and canonical(Reuse().name) == "fora"
    assert {FoCa().name, Spectrum().name} < set(METHODS)


def test_a_count_that_no_setting_has_is_rounded_up():
    assert rule_of(Reuse()).nearest(11, 50) == Schedule.fora(4, 50)
    assert rule_of(Spectrum()).nearest(50, 50) == Schedule.explicit(range(50), 50)


def test_other_forecasters_have_no_published_rule():
    forecaster = LesaForecaster("table")
    assert rule_of(forecaster) is None
    assert LesaConfig(forecaster, full_steps=10).bound_schedule(50) != Schedule.taylorseer(6, 50)
