"""Bootstrap intervals against the closed form and every resample; paired differences by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from lesa.errors import LesaError
from lesa.evaluation.intervals import bootstrap, mean, percentile_10
from lesa.evaluation.ranking import best_peer, difference, duels, name, opponents, wanted


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def row(label, psnr, lists="own"):
    method, _, count = label.partition(" @")
    return {
        "method": method.removesuffix(" (searched steps)"),
        "schedule": f"{lists}: 0,1",
        "full_steps": int(count),
        "label": label,
        "psnr": psnr,
        "psnr_mean": None if None in psnr else sum(psnr) / len(psnr),
    }


def test_of_many_values_it_is_the_normal_interval():
    values = 40 + 5 * draw(400)
    found = bootstrap(mean, values, resamples=8000)
    half = 1.96 * float(values.std(correction=0)) / math.sqrt(400)
    assert found["value"] == pytest.approx(float(values.mean()))
    assert found["low"] == pytest.approx(found["value"] - half, abs=0.06 * half)
    assert found["high"] == pytest.approx(found["value"] + half, abs=0.06 * half)


def test_of_few_values_it_is_that_of_all_resamples():
    values = [31.0, 35.5, 42.25, 38.0, 50.0]
    every = sorted(sum(pick) / 5 for pick in itertools.product(values, repeat=5))
    found = bootstrap(mean, values, resamples=20000)
    low, high = (np.quantile(every, q) for q in (0.025, 0.975))
    assert found["low"] == pytest.approx(low, abs=0.2)
    assert found["high"] == pytest.approx(high, abs=0.2)


def test_it_holds_the_truth_about_as_often_as_it_says():
    """Percentile intervals of 40 normal values hold their mean a little less often than 95 %."""
    found = [bootstrap(mean, draw(40, seed=seed), resamples=400) for seed in range(300)]
    share = sum(part["low"] <= 0 <= part["high"] for part in found) / 300
    assert 0.90 <= share <= 0.98


def test_percentile_10_is_numpys_percentile_and_knows_identical_pictures():
    values = 40 + draw(64)
    assert float(percentile_10(values)) == pytest.approx(np.percentile(values.numpy(), 10))
    values[1:] = math.inf
    assert float(percentile_10(values)) == math.inf
    found = bootstrap(percentile_10, values)
    assert found["high"] == math.inf and not math.isnan(found["low"])


def test_the_same_seed_gives_the_same_interval():
    values = draw(30)
    assert bootstrap(mean, values) == bootstrap(mean, values)
    assert bootstrap(mean, values) != bootstrap(mean, values, seed=1)


def test_pairing_removes_what_prompts_have_in_common():
    hard = 10 * draw(50)
    a, b = 42 + hard + 0.1 * draw(50, seed=1), 40 + hard + 0.1 * draw(50, seed=2)
    found = difference(row("lesa @10", a.tolist()), row("fora @10", b.tolist()))["mean"]
    assert found["value"] == pytest.approx(float((a - b).mean()))
    assert found["high"] - found["low"] < 0.15  # 4 standard errors of 0.14 / sqrt(50)
    alone = bootstrap(mean, a)
    assert alone["high"] - alone["low"] > 4


def test_difference_by_hand():
    found = difference(row("lesa @2", [50, None, 30]), row("fora @3", [40, None, 34]))
    assert found["a"] == "lesa @2" and found["b"] == "fora @3" and found["prompts"] == 3
    assert found["mean"]["value"] == pytest.approx((10 + 0 - 4) / 3)
    assert found["won"] == pytest.approx(1 / 3)
    a, b = [50.0, 60.0, 30.0], [40.0, 41.0, 34.0]
    tail = difference(row("lesa @2", a), row("fora @3", b))["p10"]["value"]
    assert tail == pytest.approx(np.percentile(a, 10) - np.percentile(b, 10))


def test_a_peer_is_met_at_the_fewest_steps_not_below():
    rows = [
        row("lesa @10", [50.0]),
        row("lesa @8", [45.0]),
        row("fora @17", [44.0]),
        row("fora @10", [40.0]),
        row("fora (searched steps) @8", [41.0], "searched"),
        row("teacache @9", [43.0]),
    ]
    at_eight = ["teacache @9", "fora (searched steps) @8"]  # ten full steps are a quarter more
    assert [r["label"] for r in opponents(rows, 8)] == at_eight
    assert [r["label"] for r in opponents(rows, 10)] == ["fora @10"]
    assert best_peer(rows, 8)["label"] == "teacache @9"
    assert best_peer(rows, 8, "searched")["label"] == "fora (searched steps) @8"
    assert best_peer(rows, 11, "searched") is None
    assert name(rows[4]) == "fora (searched steps)" and name(rows[0]) == "lesa"
    assert [(d["a"], d["b"]) for d in duels(rows)] == [
        ("lesa @10", "fora @10"),
        ("lesa @8", "teacache @9"),
        ("lesa @8", "fora (searched steps) @8"),
    ]


def test_an_older_row_tells_its_count_by_its_full_steps():
    assert wanted({"full_steps": 14}) == 14
    assert wanted({"full_steps": 13.4, "label": "teacache @14"}) == 14


def test_lengths_must_agree():
    with pytest.raises(LesaError, match=r"lengths \[2, 3\]"):
        bootstrap(lambda a, b: mean(a - b), [1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(LesaError, match="at least one"):
        bootstrap(mean, [])
