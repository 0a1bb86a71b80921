"""What a calibrated list is worth, and which count serves a target."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf, nan

import numpy as np
import pytest

from lesa import LesaForecaster, Schedule
from lesa.errors import LesaError
from lesa.forecasters.target import Target
from lesa.forecasters.worth import IDENTICAL, Worth, speedup

WORTH = Worth(50.0, 45.0, 30.0, 24, True, share=0.01)


def forecaster(counts: dict[int, dict[int, Worth | None]]) -> LesaForecaster:
    """Calibrated, by number of steps, for these counts of full steps with what they are worth."""
    made = LesaForecaster()
    for steps, entries in counts.items():
        for count, worth in entries.items():
            schedule = Schedule.explicit(range(count), steps)
            made.recommend(schedule, [1 - s / steps for s in range(steps + 1)]).worth = worth
    return made


def measured(p10: float, **more: object) -> Worth:
    return replace(WORTH, mean=p10 + 5, p10=p10, minimum=p10 - 10, **more)


def chosen(made: LesaForecaster, steps: int = 50, **target: object) -> int:
    return Target(**target).choose(made.calibrations, steps).full_steps


FOUR = forecaster({50: {8: measured(40), 13: measured(52.34), 6: measured(33), 10: measured(46)}})


def test_the_statistics_of_the_pictures():
    found = Worth.of([*range(30, 41), inf], validated=False, lpips=[0.1, 0.3], share=0.5)
    decibels = [*range(30, 41), IDENTICAL]
    assert found.mean == pytest.approx(np.mean(decibels))
    assert found.p10 == pytest.approx(np.quantile(decibels, 0.1))
    assert (found.minimum, found.pictures, found.validated) == (30, 12, False)
    assert (found.lpips_mean, found.lpips_max) == pytest.approx((0.2, 0.3))
    assert Worth.of([33.3] * 3, validated=True).minimum == 33.3  # though their mean is rounded


@pytest.mark.parametrize(("share", "times"), [(None, 5.0), (0.0, 5.0), (0.25, 2.5), (1.0, 1.0)])
def test_the_speed_up_counts_skipped_steps(share, times):
    assert speedup(10, 50, share) == pytest.approx(times)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": nan}, {"mean": inf}, {"p10": "45"}, {"pictures": 0}, {"pictures": 2.5},
        {"validated": 1}, {"share": -0.1}, {"lpips_mean": nan}, {"minimum": 45.1},
    ],
)  # fmt: skip
def test_values_that_were_never_measured(wrong):
    with pytest.raises(LesaError, match=f"worth.{next(iter(wrong))}=.*measure it again"):
        replace(WORTH, **wrong)


def test_other_rows_are_not_worth_the_same():
    made = forecaster({50: {10: WORTH}})
    (entry,) = made.calibrations
    rows = made.table(entry.schedule, entry.sigmas).coefficients
    made.correct(entry.schedule, entry.sigmas, "cond", rows)
    assert entry.worth is None


def test_nothing_was_measured():
    with pytest.raises(LesaError, match="worth.mean=nan"):
        Worth.of([40, nan], validated=True)
    with pytest.raises(LesaError, match="decibels=.*at least one"):
        Worth.of([], validated=True)


def test_it_is_saved_with_the_list(tmp_path):
    made = forecaster({50: {10: WORTH, 8: None}})
    made.save_pretrained(tmp_path)
    loaded = LesaForecaster.from_pretrained(tmp_path)
    assert [entry.worth for entry in loaded.calibrations] == [WORTH, None]


def rewritten(folder, change) -> None:
    """The config of a folder after `change` of its calibrated entries."""
    config = json.loads((folder / "config.json").read_text())
    for entry in config["calibrated"]:
        change(entry)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_of_an_older_lesa(tmp_path):
    forecaster({50: {10: WORTH}}).save_pretrained(tmp_path)
    rewritten(tmp_path, lambda entry: entry.pop("worth"))
    assert LesaForecaster.from_pretrained(tmp_path).calibrations[0].worth is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("p10", "45"), ("pictures", -1), ("share", 1e9), ("minimum", 46.0), ("further", 1)],
)
def test_a_folder_with_a_wrong_worth(field, value, tmp_path):
    forecaster({50: {10: WORTH}}).save_pretrained(tmp_path)
    rewritten(tmp_path, lambda entry: entry["worth"].update({field: value}))
    with pytest.raises(LesaError, match=f"config.json: .*worth.*{field}"):
        LesaForecaster.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ({"target_speedup": 1}, 13),
        ({"target_speedup": 3.7}, 13),  # 3.74 with a share of .01
        ({"target_speedup": 3.8}, 10),
        ({"target_speedup": 5}, 8),  # 10 of 50 are 4.81 times faster, not 5
        ({"target_speedup": np.float32(7)}, 6),
        ({"target_psnr": 52.34}, 13),
        ({"target_psnr": 46.1}, 13),
        ({"target_psnr": 46}, 10),
        ({"target_psnr": 3}, 6),
        ({"quality": "best"}, 13),
        ({"quality": "balanced"}, 10),
        ({"quality": "fast"}, 6),
    ],
)
def test_the_count_that_serves(target, count):
    assert chosen(FOUR, **{name.removeprefix("target_"): v for name, v in target.items()}) == count


def test_the_fewest_that_hold_where_more_do_not():
    """Of lists that were searched one by one, the longer is not always the better."""
    made = forecaster({50: {13: measured(44), 10: measured(47), 8: measured(40)}})
    assert chosen(made, psnr=44) == 10 and chosen(made, psnr=46) == 10


def test_the_middle_of_some_counts():
    assert chosen(forecaster({50: {13: None, 10: None, 8: None}}), quality="balanced") == 10
    assert chosen(forecaster({50: {10: None}}), quality="balanced") == 10


def test_of_the_nearest_number_of_steps():
    made = forecaster({50: {13: measured(50), 10: measured(45)}, 20: {7: measured(40), 5: WORTH}})
    assert chosen(made, 20, quality="best") == 7
    assert chosen(made, 30, quality="best") == 7  # the count stays
    assert chosen(made, 30, speedup=3.5) == 7  # 5 of 20, as a share of 30
    assert chosen(made, 40, speedup=4.5) == 8  # 10 of 50
    assert chosen(made, 6, quality="best") == 2
    assert chosen(made, 20, psnr=45) == 5


@pytest.mark.parametrize("steps", [2, 7, 10, 25, 49, 51, 100, 333])
def test_a_speed_up_is_kept_at_any_number_of_steps(steps):
    for wanted in (1, 3.5, 4.7):
        try:
            count = chosen(FOUR, steps, speedup=wanted)
        except LesaError:
            assert steps < 6  # too few for any
            continue
        assert speedup(count, steps, 0.01) >= wanted


def test_of_lists_at_two_sizes_the_nearer_one():
    made = forecaster({50: {10: measured(45)}})
    shifted = [(1 - s / 50) ** 0.5 for s in range(51)]
    made.recommend(Schedule.explicit(range(10), 50), shifted).worth = measured(30)
    target = Target(psnr=40)
    plain = made.calibrations[0].sigmas
    assert target.choose(made.calibrations, 50, plain).full_steps == 10
    with pytest.raises(LesaError, match="reach 30.0 dB"):
        target.choose(made.calibrations, 50, shifted)
    made.calibrations.reverse()
    target.check(made)  # which of them runs is not known before the run


@pytest.mark.parametrize(
    ("made", "steps", "target", "told"),
    [
        (FOUR, 50, {"speedup": 9}, "target_speedup=9: 13, 10, 8 and 6 full steps are .* make 50 "
         "steps 3.7 to 7.7 times faster; ask for at most 7.7, or train with fewer"),
        (FOUR, 50, {"psnr": 60}, "target_psnr=60: .* reach 33.0 to 52.3 dB with 13, 10, 8 and 6 of "
         "50 .*; ask for at most 52.3, or train with more"),
        (FOUR, 28, {"psnr": 30}, "target_psnr=30: nothing was measured in runs of 28 .*only of 50"),
        (forecaster({50: {10: None}}), 50, {"psnr": 30}, "target_psnr=30: this forecaster does not "
         "say what it is worth; .*train it anew"),
        (forecaster({50: {10: None}}), 50, {"speedup": 6}, "make 50 steps 5.0 times .*most 5.0"),
        (FOUR, 2, {"speedup": 3}, "make 2 steps 1.9 times faster"),
    ],
)  # fmt: skip
def test_out_of_reach(made, steps, target, told):
    with pytest.raises(LesaError, match=told):
        Target(**target).choose(made.calibrations, steps)


def test_what_is_told_as_possible_is_possible():
    for made in (FOUR, forecaster({50: {7: replace(measured(41.99), share=0.013)}})):
        for target in ({"speedup": 99}, {"psnr": 99}):
            with pytest.raises(LesaError) as caught:
                Target(**target).check(made)
            most = float(str(caught.value).split("at most ")[1].split(",")[0])
            Target(**{name: most for name in target}).check(made)


def test_a_check_asks_all_numbers_of_steps():
    made = forecaster({20: {10: measured(60)}, 50: {10: measured(45)}})
    Target(speedup=4).check(made)
    Target(psnr=50).check(made)
    with pytest.raises(LesaError, match="target_psnr=50: .*45"):
        Target(psnr=50).choose(made.calibrations, 50)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"speedup": "4"}, "target_speedup='4': not a finite number; give how many times"),
        ({"speedup": nan}, "target_speedup=nan: not a finite"),
        ({"speedup": True}, "target_speedup=True: not a finite"),
        ({"speedup": 0.5}, "target_speedup=0.5: slower than plain"),
        ({"psnr": inf}, "target_psnr=inf: not a finite number; give decibels"),
        ({"quality": "good"}, "quality='good': not one of 'best', 'balanced', 'fast'"),
        ({"quality": 3}, "quality=3: not one of"),
    ],
)
def test_values_that_are_no_target(wrong, told):
    with pytest.raises(LesaError, match=told):
        Target(**wrong)
