"""The peers run on their published full steps, at the wanted number of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.evaluation.method import Bench
from lesa.evaluation.methods import NAMES, build, build_all, parse
from lesa.evaluation.peers.forecasters import FORECASTERS
from lesa.evaluation.ranking import opponents, wanted
from lesa.forecasters import LesaForecaster
from lesa.forecasters.guard import Guard

PUBLISHED = {
    ("fora", 10): (0, 5, 10, 15, 20, 25, 30, 35, 40, 45),
    ("fora", 8): (0, 7, 14, 21, 28, 35, 42, 49),
    ("taylor-1", 10): (0, 1, 2, 8, 14, 20, 26, 32, 38, 44),
    ("taylor-2", 8): (0, 1, 2, 11, 20, 29, 38, 47),
    ("hicache", 14): (0, 1, 2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46),
    ("spectrum", 14): (0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46),
    ("spectrum", 10): (0, 1, 2, 3, 4, 6, 11, 19, 30, 44),
    ("spectrum", 9): (0, 1, 2, 3, 4, 6, 12, 22, 36),
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED)
def test_published_lists(name, count):
    assert build(name, count, Bench(50)).schedule.full_steps == PUBLISHED[name, count]


@given(
    name=st.sampled_from(sorted(FORECASTERS)),
    num_steps=st.integers(6, 60),
    share=st.floats(0.05, 1.0),
)
def test_a_peer_never_gets_fewer_full_steps_than_wanted(name, num_steps, share):
    wanted = max(1, round(share * num_steps))
    method = build(name, wanted, Bench(num_steps))
    assert wanted <= method.full_steps <= num_steps
    assert method.schedule.num_steps == num_steps


def test_fewer_steps_has_no_cache():
    method = build("fewer-steps", 8, Bench(50))
    assert (method.forecaster, method.schedule, method.num_steps) == (None, None, 8)
    assert method.schedule_text == "own: 8 steps"


def test_an_explicit_list_is_marked_as_searched():
    method = build("fora", 3, Bench(9), searched=Schedule.explicit((0, 4, 7)))
    assert method.schedule_text == "searched: 0,4,7"
    assert method.label == "fora (searched steps) @3"


class Trained:
    """As much of a trained forecaster as `build` asks for."""

    def schedule_for(self, full_steps, num_steps):
        return Schedule.explicit((0, *range(num_steps - full_steps + 1, num_steps)), num_steps)


def test_every_method_at_every_count_once():
    names = ("fewer-steps", *FORECASTERS, "lesa")
    methods = build_all(names, (13, 14), Bench(50, forecaster=Trained()), searched=True)
    labels = [method.label for method in methods]
    assert len(labels) == len(set(labels))
    assert labels.count("taylor-1 @14") == 1  # interval 4 is the nearest for 13 and for 14
    assert {"lesa @13", "lesa @14", "taylor-1 (searched steps) @13"} <= set(labels)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("sleepcache", "'sleepcache': unknown; choose all, or from fewer-steps"),
        (" , ", "none given"),
        ("fora,lesa", "'lesa': it needs a trained forecaster"),
        ("deepcache", "'deepcache': it needs a U-Net"),
    ],
)
def test_wrong_names(names, message):
    with pytest.raises(LesaError, match=message):
        parse(names, Bench(50))


def test_all_means_all_that_can_run():
    trained, untrained = Bench(50, forecaster=Trained()), Bench(50)
    assert {"fewer-steps", *FORECASTERS, "lesa"} <= set(parse("all", trained))
    assert set(NAMES) > set(parse("all", trained)) > set(parse("all", untrained))
    assert "lesa" not in parse("all", untrained)
    assert parse("lesa, fora,lesa", trained) == ("lesa", "fora")


@pytest.mark.parametrize(("count", "steps"), [(0, 50), (51, 50), (1, 0)])
def test_impossible_counts(count, steps):
    with pytest.raises(LesaError, match="full_steps|num_inference_steps"):
        build("fora", count, Bench(steps))


def test_a_count_that_was_not_trained_is_noted():
    forecaster = LesaForecaster()
    levels = [1 - i / 50 for i in range(51)]
    forecaster.recommend(Schedule.every(7, 50), levels)  # 10 full steps
    bench = Bench(50, forecaster=forecaster)
    assert build("lesa", 10, bench).note == ""
    assert build("lesa", 6, bench).note == "not trained: 10 spread anew"
    schedule = Schedule.every(7, 50)
    forecaster.correct(schedule, levels, "cond", forecaster.table(schedule, levels).coefficients)
    method = build("lesa", 11, bench)
    assert method.schedule_text.endswith("; not trained: 10 with 1 more full")
    assert method.schedule == forecaster.schedule_for(11, 50, levels)  # as `enable` runs it


def test_what_a_guard_spends_is_met_by_peers_with_as_many_full_steps():
    forecaster, schedule = LesaForecaster(), Schedule.every(7, 50)  # 10 full steps
    entry = forecaster.recommend(schedule, [1 - i / 50 for i in range(51)])
    bench, names = Bench(50, forecaster=forecaster), ("lesa", "fora")
    labels = [method.label for method in build_all(names, [10], bench)]
    assert labels == ["lesa @10", "fora @10"]
    more = Schedule.explicit([*schedule.full_steps, 15, 22], 50)
    entry.guard = Guard(schedule.full_steps[1], 0.5, more, share=0.25)
    mine, *peers = build_all(names, [10], bench)
    assert mine.label == "lesa @10" and mine.one_by_one and mine.note == "guard: spend"
    assert [len(peer.schedule.full_steps) for peer in peers] == [10, 13]  # FORA has no 11 or 12
    rows = [
        {"method": "lesa", "label": "lesa @10", "full_steps": 10.4, "schedule": "searched: "},
        *(
            {"method": "fora", "label": p.label, "full_steps": p.full_steps, "schedule": "own: "}
            for p in peers
        ),
    ]
    rows = [row | {"psnr_mean": 40.0} for row in rows]
    assert wanted(rows[0]) == 11
    assert opponents(rows, wanted(rows[0])) == []  # 13 are more than comparable
    rows[2] |= {"full_steps": 12, "label": "fora @12"}
    assert [row["label"] for row in opponents(rows, wanted(rows[0]))] == ["fora @12"]
