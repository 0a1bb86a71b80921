"""L2P against training on the features themselves; the paper's LESA as a peer."""

from __future__ import annotations

import gc
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lesa
from lesa.core.schedule import Schedule
from lesa.evaluation.method import Bench
from lesa.evaluation.peers.learned import (
    L2P,
    LEARNED,
    _hidden_statistics,
    fit_l2p,
    l2p_schedule,
)
from lesa.evaluation.peers.per_run_cache import once_per_bench
from lesa.forecasters import Forecaster, Reuse
from lesa.training.fit import fit_paper
from lesa.training.statistics import Statistics, inner_products
from tests.tiny_pipelines import build, run

STEPS = 10


def smooth_features(pictures=3, steps=STEPS, width=40):
    """Random walks, float64 [P, S, D]."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(pictures, steps, width, dtype=torch.float64, generator=draw)
    return noise.cumsum(1) / 3


def statistics_of(features):
    found = Statistics(tuple(torch.linspace(1, 0, STEPS + 1).tolist()), "output", 0, {"default": 1})
    ones = torch.ones(1, features.shape[-1], dtype=torch.float64)
    grams = [inner_products(torch.cat([picture, ones])) for picture in features]
    found.extend(torch.stack(grams), [f"prompt {i}" for i in range(len(features))])
    return found


def test_l2p_is_trained_as_on_the_features():
    """The recipe on tensors: row i of a lower triangular map gives the output of step i + 1."""
    features = smooth_features()
    weights = torch.eye(STEPS, dtype=torch.float64).requires_grad_()
    optimiser = torch.optim.Adam([weights], lr=0.01)
    for _ in range(201):
        ahead = (weights.tril() @ features)[:, :-1]
        loss = (ahead - features[:, 1:]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found = fit_l2p(statistics_of(features)).weights["default"]
    torch.testing.assert_close(found[1:, :-1], weights.detach().tril()[:-1, :-1])
    assert not found[0].any() and not found.triu().any()


def test_its_table_is_the_autoregressive_run():
    features = smooth_features()
    forecaster = fit_l2p(statistics_of(features))
    assert isinstance(forecaster, Forecaster) and forecaster.tap == "output"
    schedule, weights = Schedule.explicit([0, 1, 4, 7], STEPS), forecaster.weights["default"]
    table = forecaster.table(schedule, [], "default")
    assert table.history == forecaster.history(schedule) == 4 and not table.autoregressive
    known = []
    for step in range(STEPS):
        if schedule.is_full(step):
            known.append(features[0, step])
            continue
        known.append(sum(weights[step, j] * known[j] for j in range(step)))
        past = [features[0, p] for p in schedule.cached_before(step, 4)]
        torch.testing.assert_close(table.apply(past, step), known[-1])


def test_l2p_refuses_what_it_was_not_trained_for():
    forecaster = L2P({"cond": torch.zeros(STEPS, STEPS, dtype=torch.float64)})
    with pytest.raises(lesa.LesaError, match="num_steps=6, but this map is tied to 10"):
        forecaster.table(Schedule.every(2, 6), [], "cond")
    with pytest.raises(lesa.LesaError, match="'uncond' was not trained"):
        forecaster.table(Schedule.every(2, STEPS), [], "uncond")


@pytest.mark.parametrize(
    ("wanted", "published"),
    [
        (11, (0, 1, 2, 4, 6, 9, 14, 23, 30, 37, 44)),
        (10, (0, 1, 2, 4, 6, 9, 14, 23, 30, 37, 44)),
        (8, (0, 1, 2, 4, 9, 17, 26, 35, 43)),
        (6, (0, 1, 2, 4, 12, 24, 38)),
    ],
)
def test_published_lists_of_l2p(wanted, published):
    assert l2p_schedule(wanted, 50).full_steps == published


@settings(deadline=None)
@given(num_steps=st.integers(1, 120), share=st.floats(0, 1))
def test_every_count_has_a_list(num_steps, share):
    wanted = max(1, round(share * num_steps))
    found = l2p_schedule(wanted, num_steps)
    assert found.steps == num_steps and len(found.full_steps) >= wanted


@pytest.fixture(scope="module")
def bench():
    pipe, call = build("flux")
    arguments = {name: value for name, value in call().items() if name != "generator"}
    return Bench(STEPS, pipe, arguments | {"num_inference_steps": STEPS}, ("a prompt",))


def test_l2p_is_trained_on_the_bench_and_beats_reuse_there(bench):
    """On the run that it was trained on it must be nearer to the plain one than reuse."""
    method = LEARNED["l2p"].build("l2p", 4, bench, None)
    assert method.full_steps == 4 and method.origin == "own"
    again = LEARNED["l2p"].build("l2p", 4, bench, Schedule.explicit([0, 2, 5]))
    assert again.forecaster is method.forecaster and again.origin == "searched"

    def result():
        seeded = torch.Generator().manual_seed(bench.seed)
        return run(bench.pipe, {**bench.settings, "generator": seeded})

    plain, errors = result(), []
    for forecaster in (method.forecaster, Reuse()):
        with lesa.accelerate(bench.pipe, forecaster, schedule=method.schedule):
            errors.append(float((result() - plain).norm()))
            assert not lesa.stats(bench.pipe).fallbacks
    assert 0 < errors[0] < errors[1]


def test_the_papers_lesa_in_three_forms_shares_its_statistics(bench, monkeypatch):
    monkeypatch.setattr(
        sys.modules["lesa.training.train"], "fit_paper", partial(fit_paper, iterations=3)
    )
    collected, save = [], Statistics.save
    monkeypatch.setattr(
        Statistics, "save", lambda *given: collected.append(save(*given)) or collected[-1]
    )
    names = []
    for name in ("lesa-paper", "lesa-paper-edge", "lesa-paper-mlp"):
        method = LEARNED[name].build(name, 4, bench, None)
        names.append(method.forecaster.name)
        assert (method.forecaster.tap, method.forecaster.form) == ("hidden", "paper")
        assert method.schedule == Schedule.every(4, STEPS) and method.full_steps == 4
        assert method.forecaster.calibrated == [method.schedule]
    assert names == ["lesa-paper-ridge", "lesa-paper-edge", "lesa-paper-mlp"]
    assert len(collected) == 1  # one batch, by the first of them
    given = Schedule.explicit([0, 3, 6])
    method = LEARNED["lesa-paper"].build("lesa-paper", 3, bench, given)
    assert method.label == "lesa-paper (searched steps) @3" and len(collected) == 1


def test_without_calibration_prompts_they_say_so():
    for peer in LEARNED.values():
        assert peer.takes_lists and peer.unfit(Bench(50, calibration=("a",))) is None
        assert "give --calibration FILE" in peer.unfit(Bench(50))


def test_a_value_lives_as_long_as_its_bench():
    made = []
    remembered = once_per_bench(lambda bench: made.append(bench.seed) or [bench.seed])
    first, second = Bench(50, seed=1), Bench(50, seed=1)
    assert remembered(first) is remembered(first) is not remembered(second)
    assert made == [1, 1]
    del first
    gc.collect()
    third = Bench(50, seed=3)
    assert remembered(third) == [3]


def test_statistics_of_a_bench_are_closed_with_it(bench):
    """Nothing is left to be cleaned up by chance, which Python warns of."""
    own = replace(bench)
    folder = Path(_hidden_statistics(own))
    assert folder.is_dir() and _hidden_statistics(own) == str(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        del own
        gc.collect()
    assert not folder.exists()
