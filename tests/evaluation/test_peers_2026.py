"""The peers of 2026 in a comparison, and BudCache's search."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
import torch

from lesa import testbed
from lesa.evaluation.compare import compare
from lesa.evaluation.method import Bench
from lesa.evaluation.methods import build as method
from lesa.evaluation.methods import unfit
from lesa.evaluation.metrics_row import MetricsRow
from lesa.evaluation.peers import budcache
from lesa.evaluation.peers.budcache import Search
from lesa.evaluation.runner import Chunk, run_method
from tests.evaluation.block_calls import STEPS
from tests.tiny_pipelines import build

NEW = ("dpcache", "meancache", "budcache", "sencache", "dicache", "tc-pade")


def test_the_search_keeps_its_rules_and_finds_the_best(monkeypatch):
    """On an error that tells how far a list is from a hidden one, it finds that one."""
    hidden = (0, 1, 5, 9, 14, 22, 30, 41)
    asked = []

    def error(full):
        assert len(full) == 8 == len(set(full)) and full[:2] == (0, 1) and max(full) < 50
        asked.append(full)
        return sum((a - b) ** 2 for a, b in zip(full, hidden, strict=True)) / 1e3

    search = Search(50, 8, error, most=3000, draw=random.Random(1))
    assert search.lead == 2 and search.best() == hidden
    assert len(asked) == len(set(asked)) == len(search.known)
    fewer = Search(50, 8, lambda full: sum(full), most=30)
    assert fewer.known[fewer.best()] == min(fewer.known.values()) and len(fewer.known) == 30
    for steps, wanted in ((4, 1), (4, 4), (8, 2)):
        tried = Search(steps, wanted, lambda full: float(sum(full)))
        assert len(tried.best()) == wanted
    assert Search(8, 3, lambda full: float(sum(full))).best() == (0, 1, 2)
    rounds = {full for full in Search(9, 4, error).neighbours((0, 3, 5, 8))}
    near = [
        full
        for full in combinations(range(9), 4)
        if full[0] == 0 and len({*full} - {0, 3, 5, 8}) == 1
    ]
    assert rounds <= set(near)


@pytest.mark.parametrize("name", NEW)
def test_each_is_built_at_its_own_calibration_and_run(monkeypatch, name):
    monkeypatch.setattr(budcache, "ANNEALING", 5)
    monkeypatch.setattr(budcache, "CLIMBS", 1)
    pipe, call = build("flux")
    settings = {key: value for key, value in call().items() if key != "generator"}
    bench = Bench(STEPS, pipe, settings, ("a title",))
    found, plain, measured = method(name, 4, bench), method("fora", STEPS, bench), MetricsRow()
    assert found.full_steps == 4 and found.origin == "own"
    chunk = Chunk.of(["a title"], settings, [0], 0, 1)
    expected = run_method(pipe, plain, chunk, MetricsRow()).images
    made = run_method(pipe, found, chunk, measured).images
    assert torch.equal(run_method(pipe, plain, chunk, MetricsRow()).images, expected)
    assert not torch.equal(made, expected) and (made - expected).std() < expected.std()
    assert measured.cache_bytes > 0
    assert all(4 <= count <= 5 for count in measured.full_steps)  # each branch decides


@pytest.mark.slow  # the embedded pipeline, six methods
def test_they_run_in_a_comparison_of_the_embedded_flux(monkeypatch):
    monkeypatch.setattr(budcache, "ANNEALING", 8)
    monkeypatch.setattr(budcache, "CLIMBS", 0)
    pipe = testbed.load("flux")
    settings = testbed.settings("flux") | {"num_inference_steps": STEPS}
    bench = Bench(STEPS, pipe, settings, testbed.prompts("flux", 1, seed=0, split="train"))
    assert [name for name in NEW if unfit(name, bench)] == []
    names = ("fewer-steps", *NEW)
    texts = testbed.prompts("flux", 1, seed=1, split="test")
    result = compare(pipe, texts, [method(name, 5, bench) for name in names], settings)
    rows = {row["method"]: row for row in result.rows}
    assert set(rows) == set(names)
    for name in NEW:
        assert 3 <= rows[name]["full_steps"] <= 7 and rows[name]["cache_bytes"] > 0
        assert rows[name]["tflops"] < result.plain_tflops
        assert rows[name]["psnr_mean"] > 15


def other():
    pipe, call = build("sdxl")
    return Bench(STEPS, pipe, call(), ("a title",))


def test_who_cannot_run_says_why():
    for name in NEW[2:]:
        assert "UNet2DConditionModel has no layout" in unfit(name, other())
    bare = Bench(STEPS, build("flux")[0])
    for name in NEW[:5]:
        assert "calibration" in unfit(name, bare)
    assert unfit("tc-pade", bare) is None
