import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lesa.core.schedule import Schedule, spread
from lesa.errors import LesaError

rules = st.one_of(
    st.builds(Schedule.every, st.integers(1, 30)),
    st.builds(Schedule.fora, st.integers(1, 30)),
    st.builds(Schedule.taylorseer, st.integers(1, 30)),
    st.builds(Schedule.spectrum, st.floats(0, 10)),
)


@pytest.mark.parametrize(
    ("interval", "num_steps", "full"),
    [
        (5, 50, (0, 1, 2, 3, 7, 12, 17, 22, 27, 32, 37, 42, 47)),
        (7, 50, (0, 1, 2, 3, 9, 16, 23, 30, 37, 44)),
        (10, 50, (0, 1, 2, 3, 12, 22, 32, 42)),
        (2, 8, (0, 1, 2, 4, 6)),
        (3, 8, (0, 1, 4, 7)),
        (4, 8, (0, 4)),
        (3, 4, (0, 3)),
        (4, 4, (0,)),
    ],
)
def test_every_is_the_papers(interval, num_steps, full):
    assert Schedule.every(interval, num_steps=num_steps).full_steps == full


def test_every_8_of_50_has_nine():
    assert len(Schedule.every(8, 50).full_steps) == 9


@pytest.mark.parametrize(("interval", "count"), [(3, 17), (5, 10), (7, 8)])
def test_fora_counts(interval, count):
    schedule = Schedule.fora(interval, 50)
    assert len(schedule.full_steps) == count
    assert schedule.full_steps[:3] == (0, interval, 2 * interval)


@pytest.mark.parametrize(("interval", "count"), [(4, 14), (5, 12), (6, 10), (7, 9), (9, 8)])
def test_taylorseer_counts(interval, count):
    schedule = Schedule.taylorseer(interval, 50)
    assert len(schedule.full_steps) == count
    assert schedule.full_steps[:4] == (0, 1, 2, 2 + interval)


@pytest.mark.parametrize(
    ("growth", "full"),
    [
        (0.75, (0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46)),
        (2, (0, 1, 2, 3, 4, 6, 10, 16, 24, 34, 46)),
        (3, (0, 1, 2, 3, 4, 6, 11, 19, 30, 44)),
        (4, (0, 1, 2, 3, 4, 6, 12, 22, 36)),
    ],
)
def test_spectrum_lists(growth, full):
    assert Schedule.spectrum(growth, 50).full_steps == full


@settings(deadline=None)
@given(rule=rules, num_steps=st.integers(1, 120))
def test_a_bound_rule_parts_the_steps(rule, num_steps):
    schedule = rule.bind(num_steps)
    assert schedule.full_steps[0] == 0
    assert sorted(schedule.full_steps + schedule.skipped_steps) == list(range(num_steps))
    assert all(schedule.is_full(s) == (s in schedule.full_steps) for s in range(num_steps))
    assert Schedule.from_dict(schedule.to_dict()) == schedule
    assert Schedule.from_dict(rule.to_dict()) == rule


@settings(deadline=None)
@given(rule=rules, num_steps=st.integers(2, 80), count=st.integers(0, 9), data=st.data())
def test_cached_before_is_newest_first(rule, num_steps, count, data):
    schedule = rule.bind(num_steps)
    step = data.draw(st.integers(0, num_steps - 1))
    before = [s for s in schedule.full_steps if s < step][::-1]
    assert schedule.cached_before(step, count) == tuple(before[:count])


@settings(deadline=None)
@given(rule=rules, num_steps=st.integers(2, 60), other=st.integers(2, 60))
def test_resampled_keeps_the_count_where_it_fits(rule, num_steps, other):
    schedule = rule.bind(num_steps)
    if len(schedule.full_steps) <= other:
        there = schedule.resampled(other)
        assert (there.num_steps, len(there.full_steps)) == (other, len(schedule.full_steps))
        assert num_steps != other or there == schedule
    else:
        with pytest.raises(LesaError, match=": more than num_steps"):
            schedule.resampled(other)


def test_spread_makes_room():
    assert spread([0.0, 0.2, 0.4, 9.0, 9.1], 10) == (0, 1, 2, 8, 9)


@settings(deadline=None)
@given(num_steps=st.integers(1, 60))
def test_interval_one_computes_every_step(num_steps):
    assert Schedule.every(1, num_steps).skipped_steps == ()


def test_equality_and_hash_go_by_the_bound_steps():
    listed = Schedule.explicit([9, 3, 2, 1, 0, 16, 23, 30, 37, 44, 44], 50)
    assert listed == Schedule.every(7, 50)
    assert hash(listed) == hash(Schedule.every(7, 50))
    assert Schedule.every(7) != Schedule.every(7, 50)
    assert Schedule.every(7) != Schedule.fora(7)


def test_bind_refuses_another_step_count():
    schedule = Schedule.every(7).bind(50)
    assert schedule.bind(50) is schedule
    with pytest.raises(LesaError, match="bound to 50 steps, the run has 28"):
        schedule.bind(28)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Schedule.every(0), "interval=0"),
        (lambda: Schedule("every", 2.5), "interval=2.5"),
        (lambda: Schedule.every(True), "interval=True"),
        (lambda: Schedule.every(5, 0), "num_steps=0"),
        (lambda: Schedule.explicit([1, 2]), "lacks step 0"),
        (lambda: Schedule.explicit([]), "lacks step 0"),
        (lambda: Schedule.explicit([0, -1]), "entry=-1"),
        (lambda: Schedule.explicit([0, 50], 50), "holds step 50"),
        (lambda: Schedule.explicit(range(9), 8), "holds 9 steps but num_steps=8"),
        (lambda: Schedule.spectrum(-1), "growth=-1"),
        (lambda: Schedule.every(5).full_steps, "bind"),
        (lambda: Schedule.every(5).skipped_steps, "bind"),
        (lambda: Schedule.every(5).is_full(0), "bind"),
        (lambda: Schedule.every(5).cached_before(3, 2), "bind"),
        (lambda: Schedule("sometimes", 3), "rule='sometimes': unknown"),
        (lambda: Schedule.from_dict({"rule": "every"}), "no field 'value'"),
    ],
)
def test_errors_name_the_field_and_value(make, told):
    with pytest.raises(LesaError, match=told):
        make()


WRONG_COUNTS = [None, 0, -1, 2.5, "8", True, torch.ones(2), torch.tensor(True), 10**30, [8]]


@pytest.mark.parametrize("wrong", WRONG_COUNTS, ids=repr)
def test_a_wrong_step_count_is_one_sentence(wrong):
    unbound, bound = Schedule.every(3), Schedule.every(3, 12)
    for call in (unbound.bind, bound.bind, bound.resampled):
        with pytest.raises(LesaError, match="num_steps="):
            call(wrong)
    if wrong is not None:
        with pytest.raises(LesaError, match="num_steps="):
            Schedule.fora(2, wrong)


@pytest.mark.parametrize("wrong", [None, 0, 2.5, "8", True, torch.ones(2), [8]], ids=repr)
def test_wrong_settings_are_one_sentence(wrong):
    for rule in (Schedule.every, Schedule.fora, Schedule.taylorseer):
        with pytest.raises(LesaError, match="interval="):
            rule(wrong, 12)
    with pytest.raises(LesaError, match="full_steps"):
        Schedule.explicit(wrong)
    with pytest.raises(LesaError, match="full_steps entry="):
        Schedule.explicit([0, -1 if isinstance(wrong, int) and not wrong else wrong])


@pytest.mark.parametrize(
    "wrong", [None, -1, "2", True, float("nan"), 10**400, torch.ones(2)], ids=repr
)
def test_wrong_growth_is_one_sentence(wrong):
    with pytest.raises(LesaError, match="growth="):
        Schedule.spectrum(wrong)


@pytest.mark.parametrize("wrong", [12, -1, None, 1.0, "1", torch.ones(2)], ids=repr)
def test_a_step_past_the_end_is_refused(wrong):
    with pytest.raises(LesaError, match="step="):
        Schedule.every(3, 12).is_full(wrong)


@pytest.mark.parametrize(
    "wrong", [None, [], "every(3)", {"rule": "every"}, {"rule": [], "value": 1}]
)
def test_a_wrong_description_is_one_sentence(wrong):
    with pytest.raises(LesaError, match="schedule=|rule="):
        Schedule.from_dict(wrong)


def test_numbers_of_numpy_and_of_tensors_are_taken():
    made = Schedule.explicit(np.array([0, 3, 7]), np.int64(12))
    assert made == Schedule.explicit(torch.tensor([0, 3, 7]), torch.tensor(12))
    assert made.full_steps == (0, 3, 7) and type(made.num_steps) is int
    assert made.is_full(np.int32(3))
