"""What all other engines' loops have in common."""

import warnings

import pytest

from lesa import LesaError, LesaForecaster, Schedule
from lesa.engine.config import LesaConfig
from lesa.forecasters.guard import Guard
from lesa.integrations.stream import Plan

STEPS = 6
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]


def test_a_guard_that_does_not_run_is_told():
    """Those loops have no step at which they could change their list."""
    made = LesaForecaster("table", num_steps=STEPS)
    entry = made.recommend(Schedule.explicit([0, 2, 4], STEPS), SIGMAS)
    entry.guard = Guard(2, 0.5, Schedule.explicit([0, 2, 3, 4], STEPS))
    with pytest.raises(LesaError, match="guard='spend': only lesa.enable runs guards"):
        Plan(LesaConfig(made, guard="spend"))
    with pytest.warns(UserWarning, match="guard: lesa-table has one, which only lesa.enable runs"):
        assert Plan(LesaConfig(made)).config.guard == "off"
    entry.guard = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Plan(LesaConfig(made))
