"""Tables on their way to the step path: what the user is told of them."""

import warnings

import pytest
from tiny_pipelines import build, run

import lesa
from lesa.core.schedule import Schedule


@pytest.fixture(scope="module")
def flux():
    return build("flux")


def warned(flux, forecaster, schedule, steps):
    """What two generations warn of."""
    pipe, call = flux
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with lesa.accelerate(pipe, forecaster, schedule=schedule):
            for batch in (1, 2):
                run(pipe, call(batch) | {"num_inference_steps": steps})
    return [str(w.message) for w in found if "magnitude" in str(w.message)]


def test_coefficients_that_magnify_errors_are_told_once(flux):
    """A cubic through the first four steps is followed to the end of the run."""
    front = Schedule.explicit(range(4), 40)
    (told,) = warned(flux, lesa.Taylor(3), front, 40)
    assert "taylor-3: coefficients of one step add up to" in told and "above 1000" in told


@pytest.mark.parametrize("forecaster", [lesa.Taylor(3), lesa.Taylor(1), lesa.Reuse()], ids=str)
def test_usual_lists_are_not(flux, forecaster):
    assert not warned(flux, forecaster, Schedule.every(5, 20), 20)


def test_a_run_shorter_than_its_full_steps_is_told_once(flux):
    pipe, call = flux
    with lesa.accelerate(pipe, full_steps=10), pytest.warns(UserWarning) as found:
        for _ in range(2):
            run(pipe, call(1) | {"num_inference_steps": 4})
        assert lesa.stats(pipe).skipped == 0
    (told,) = [str(w.message) for w in found if "full_steps" in str(w.message)]
    assert told.startswith("full_steps=10: the run has 4 steps; give at most 4, else every step")
