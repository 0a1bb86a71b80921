"""The numbers of full steps that the page offers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.forecasters import Prior, Taylor
from lesa.play.counts import Counts, counts_of


def trained(lists: dict[int, tuple[int, ...]]) -> SimpleNamespace:
    """Something that was trained for these counts, by the number of steps."""
    return SimpleNamespace(
        calibrated=[
            Schedule.explicit(range(n), steps) for steps, some in lists.items() for n in some
        ]
    )


@pytest.mark.parametrize(
    ("forecaster", "steps", "offered", "default"),
    [
        (Prior(), 50, (), 10),
        (Taylor(), 6, (), 3),
        (trained({50: (13, 8, 10)}), 50, (8, 10, 13), 10),
        (trained({50: (13, 8), 20: (7, 5)}), 20, (5, 7), 5),  # those of this number of steps
        (trained({50: (13, 10, 8)}), 9, (8,), 8),
    ],
)
def test_what_is_offered(forecaster, steps, offered, default):
    counts = counts_of(forecaster, steps)
    assert (counts.trained, counts.default) == (offered, default)
    assert counts.ends == ((offered[0], offered[-1]) if offered else (1, steps))


def test_a_run_with_fewer_steps_than_trained_full_steps_is_refused():
    with pytest.raises(LesaError, match="num-inference-steps=7: .* trained for 8 .* at least 8"):
        counts_of(trained({50: (13, 8)}), 7)


def test_a_slider_between_two_trained_counts_stops_at_the_nearest():
    counts = Counts(50, (8, 10, 13))
    assert [counts.moved(count) for count in (8, 9, 11, 12, 50)] == [8, 10, 10, 13, 13]
    assert Counts(50).moved(11) == 11


@pytest.mark.parametrize(
    ("count", "sentence"),
    [
        (0, "full steps=0: .*use 1 or more"),
        (51, "full steps=51: .*choose from 1 to .*50"),
        (9.5, "full steps=9.5: not a whole number"),
        (None, "full steps=None: not a whole number"),
        (True, "full steps=True: not a whole number"),
        (9, "full steps=9: .*not trained for it; give 8 or 10"),
    ],
)
def test_a_count_that_is_not_offered_is_refused(count, sentence):
    counts = Counts(50, (8, 10))
    with pytest.raises(LesaError, match=sentence):
        counts.check(count, "full steps")
    if count != 9:
        with pytest.raises(LesaError, match=sentence):
            counts.moved(count)
