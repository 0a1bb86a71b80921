"""A short soak, and files that were changed by chance; benchmarks/soak.py has the long form."""

from __future__ import annotations

import pytest
from file_fuzz import CONFIG, STATISTICS, WEIGHTS, Fuzz
from soak_run import slope, soak


def test_every_picture_of_a_soak_is_as_if_alone():
    found = soak(50, seed=364, distinct=20)
    assert found.differ == []
    assert found.requests == 50 and found.ended["picture"] > 25
    assert found.calls["skipped"] > found.calls["full"] / 2
    assert {"raise", "interrupt", "nested", "prompt", "close"} < set(found.events)
    assert {"enable", "disable", "accelerate", "none", "refused"} == set(found.changes)
    first, *_, last = found.samples
    assert last[2] <= first[2] + 200  # live tensors: a run that stays leaves hundreds


def test_a_slope_is_told_with_its_noise():
    told = slope([(x, 2 * x + 5) for x in range(0, 100, 10)])
    assert told["per_100_requests"] == pytest.approx(200)
    assert told["standard_error"] == pytest.approx(0, abs=1e-6)
    scattered = slope([(x, (x // 10) % 2) for x in range(0, 100, 10)])
    assert abs(scattered["per_100_requests"]) < 3 * scattered["standard_error"]


def test_changed_files_work_or_are_refused_in_one_sentence(tmp_path):
    fuzz = Fuzz(tmp_path).run(100, seed=1)
    assert fuzz.faults == []
    names = {kind.partition(":")[0] for kind, _ in fuzz.ended}
    assert names == {CONFIG, WEIGHTS, STATISTICS}
    ends = {ended for _, ended in fuzz.ended}
    assert ends == {"works", "sentence"}
