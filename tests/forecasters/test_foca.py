"""FoCa against its own recursion, step by step, and against closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lesa.core.schedule import Schedule
from lesa.forecasters import FoCa, Forecaster

schedules = st.builds(
    lambda full, steps: Schedule.explicit({0, *(s for s in full if s < steps)}, steps),
    st.sets(st.integers(1, 39)),
    st.integers(2, 40),
)


def forecasts(schedule, features):
    table = FoCa().table(schedule, [])
    return {
        s: table.apply([features[p] for p in schedule.cached_before(s, table.history)], s)
        for s in schedule.skipped_steps
    }


def step_by_step(schedule, features):
    """Predictor and corrector on the features themselves: values and their steps, newest first."""
    found, full, window = {}, [], []
    for s in range(schedule.steps):
        if schedule.is_full(s):
            full.insert(0, s)
            window = [(p, features[p]) for p in full[:2]]
            continue
        value = features[full[0]]
        if len(full) > 1:
            (p, q), ((i, newest), (j, older)) = full[:2], window
            slope = (newest - older) / (i - j)
            bdf2 = (4 * newest - older + 2 * slope) / 3  # a step ahead, were i - j = 1
            if i - j == 1:
                torch.testing.assert_close(bdf2, newest + slope)
            anchor = (features[p] - features[q]) / (p - q)
            k = s - p
            reach = k if k <= 3 else 3 * 3 / k
            value = features[p] + reach * (anchor + slope) / 2
        found[s] = value
        window = [(s, value), window[0]]
    return found


def test_it_is_a_forecaster_of_two_features():
    assert isinstance(FoCa(), Forecaster)
    schedule = Schedule.taylorseer(6, 50)
    table = FoCa().table(schedule, [])
    assert table.history == FoCa().history(schedule) == 2
    alone = Schedule.explicit([0], 4)
    assert FoCa().table(alone, []).coefficients.tolist() == [[0], [1], [1], [1]]


@settings(deadline=None)
@given(schedule=schedules)
def test_it_equals_the_recursion(schedule):
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(schedule.steps, 5, dtype=torch.float64, generator=draw)
    found, expected = forecasts(schedule, features), step_by_step(schedule, features)
    assert found.keys() == expected.keys()
    for s, value in found.items():
        torch.testing.assert_close(value, expected[s], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("interval", [2, 3, 4])
def test_straight_lines_are_exact_up_to_three_steps(interval):
    schedule = Schedule.taylorseer(interval, 30)
    line = 3 - 0.7 * torch.arange(30, dtype=torch.float64)[:, None]
    for s, value in forecasts(schedule, line).items():
        torch.testing.assert_close(value, line[s], rtol=0, atol=1e-12)


def test_long_forecasts_are_damped():
    """From the fourth step on a line of slope 1 is 9 / k (1 + the forecasts' own slope) / 2."""
    schedule = Schedule.explicit([0, 1], 8)
    line = torch.arange(8, dtype=torch.float64)[:, None]
    found = forecasts(schedule, line)
    ahead = [float(found[1 + k]) - 1 for k in range(1, 6)]
    assert ahead == pytest.approx([1, 2, 3, 9 / 4, 9 / 10 * (1 + 9 / 4 - 3)])


def test_the_error_on_a_smooth_feature_is_of_second_order():
    """Halving the spacing of the noise levels divides the error of a forecast by 4."""

    def error(spacing):
        curve = torch.exp(spacing * torch.arange(5, dtype=torch.float64))[:, None]
        return float((forecasts(Schedule.explicit([0, 2], 5), curve)[4] - curve[4]).abs())

    assert error(0.02) / error(0.01) == pytest.approx(4, rel=0.05)
