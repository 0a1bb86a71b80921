from __future__ import annotations

import pytest
import torch
from lesa_kernels.config import Config
from lesa_kernels.experimental.gram import gram
from lesa_testbed import reference

TWO = Config(256, 128, 2)


@pytest.mark.parametrize(
    ("shape", "samples", "history", "dtype"),
    [
        ((1, 1), 1, 1, torch.float32),
        ((3, 7, 29), 3, 2, torch.bfloat16),
        ((4, 5, 100), 1, 8, torch.float16),
    ],
)
def test_against_the_reference(shape, samples, history, dtype, rand, integers, device):
    ring, feature, base = rand(history + 1, *shape, dtype=dtype), rand(*shape), rand(*shape)
    slots = integers(*range(history, 0, -1))
    for extra in (None, base):
        width = history + 2 + (extra is not None)
        out, exact = (torch.full((samples, width), torch.nan).double().to(device) for _ in "ab")
        gram(feature, ring, slots, out, base=extra, config=TWO)
        reference.gram(feature, ring, slots, exact, base=extra)
        terms = float((feature.double() ** 2).sum()) + 1
        assert (out - exact).abs().max() <= 2**-20 * terms


def test_is_what_least_squares_needs(rand, integers, device):
    """The squared error of a forecast, from inner products alone."""
    ring, target, weights = rand(2, 6, 50), rand(6, 50), (1.5, -0.5)
    rows = torch.empty(3, 1, 5, dtype=torch.float64, device=device)
    for feature, row in zip((*ring, target), rows, strict=True):
        gram(feature, ring, integers(0, 1), row, base=target, config=TWO)
    products = rows[:, 0, 2:]  # [3, 3], over (ring 0, ring 1, target)
    vector = torch.tensor([*weights, -1.0], dtype=torch.float64, device=device)
    error = sum(w * x.double() for w, x in zip(weights, ring, strict=True)) - target.double()
    torch.testing.assert_close(vector @ products @ vector, (error**2).sum(), rtol=1e-5, atol=0)


def test_more_samples_than_a_grid_is_high(rand, integers, device, monkeypatch):
    """CUDA takes 65,535 programs in y; here 3, for the interpreter's sake."""
    monkeypatch.setattr("lesa_kernels.experimental.gram.GRID_Y", 3)
    feature, ring = rand(10, 8), rand(2, 10, 8)
    out, exact = (torch.full((10, 3), torch.nan).double().to(device) for _ in "ab")
    gram(feature, ring, integers(1), out, config=TWO)
    reference.gram(feature, ring, integers(1), exact)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)


def test_two_runs_agree_bit_for_bit_and_nothing_is_left_unwritten(rand, integers, device):
    feature, ring = rand(2, 999), rand(2, 2, 999)
    results = [torch.full((2, 3), torch.nan, dtype=torch.float64, device=device) for _ in "ab"]
    for out in results:
        gram(feature, ring, integers(1), out, config=TWO)
    assert torch.equal(*results)
    assert (results[0][:, 0] - feature.double().sum(1)).abs().max() < 1e-3


def test_an_empty_feature_has_zero_products(rand, integers, device):
    out = torch.full((1, 3), torch.nan, dtype=torch.float64, device=device)
    assert not gram(rand(0, 4), rand(2, 0, 4), integers(0), out).any()
