"""mix_row against a float64 sum of the same rounded inputs."""

from __future__ import annotations

import pytest
import torch

from lesa import Schedule, Table
from lesa.engine.ring import Ring
from lesa.ops.eager import mix_row as mix

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def reference(ring, slots, coefficients, latent=None, latent_coefficient=0.0, bias=0.0):
    total = sum(c * ring[i].double() for i, c in zip(slots, coefficients, strict=True)) + bias
    return total if latent is None else total + latent_coefficient * latent.double()


def bound(exact, terms, dtype):
    """Half a unit of the store's rounding plus K + 2 roundings of the fp32 sum."""
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    size = exact.abs() * torch.finfo(dtype).eps / 2
    return size + terms * wide * 16 + torch.finfo(dtype).tiny


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("history", range(1, 9))
@pytest.mark.parametrize("size", [1, 63, 100, 4097])
def test_one_rounding_at_the_store(dtype, history, size):
    torch.manual_seed(history)
    ring = torch.randn(history, size).to(dtype)
    slots = torch.randperm(history).tolist()
    coefficients = (torch.randn(history) * 2).tolist()
    out = torch.full((size,), float("nan")).to(dtype)
    assert mix(ring, slots, coefficients, out) is out
    exact = reference(ring, slots, coefficients)
    assert ((out.double() - exact).abs() <= bound(exact, history + 2, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("latent_dtype", [torch.float32, torch.bfloat16])
def test_latent_and_bias(dtype, latent_dtype):
    ring, latent = torch.randn(2, 7, 9).to(dtype), torch.randn(9, 7).T.to(latent_dtype)
    out = torch.empty(7, 9, dtype=dtype)
    mix(ring, (1, 0), (1.5, -0.25), out, latent, -2.0, 0.125)
    exact = reference(ring, (1, 0), (1.5, -0.25), latent, -2.0, 0.125)
    assert ((out.double() - exact).abs() <= bound(exact, 6, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_over_the_evicted_slot(dtype):
    ring = torch.randn(4, 33).to(dtype)
    apart = mix(ring, (2, 1, 0, 3), (2.0, -1.0, 0.5, 0.25), torch.empty(33, dtype=dtype))
    assert torch.equal(mix(ring, (2, 1, 0, 3), (2.0, -1.0, 0.5, 0.25), ring[3]), apart)


def test_a_zero_coefficient_reads_nothing():
    ring = torch.full((3, 5), float("nan"))
    ring[1] = 1.0
    assert torch.equal(mix(ring, (1, 0, 2), (3.0, 0.0, 0.0), torch.empty(5)), torch.full((5,), 3.0))
    assert torch.equal(mix(ring, (1, 0, 2), (0.0, 0.0, 0.0), torch.empty(5)), torch.zeros(5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reuse_is_bit_exact_and_empty_is_fine(dtype):
    ring = torch.randn(2, 11).to(dtype)
    assert torch.equal(mix(ring, (1, 0), (1.0, 0.0), torch.empty(11, dtype=dtype)), ring[1])
    assert mix(ring[:, :0], (1, 0), (1.0, 1.0), torch.empty(0, dtype=dtype)).numel() == 0


def test_same_as_the_tables_own_float64_mix():
    schedule = Schedule.explicit([0, 1, 2], 5)
    rows = torch.zeros(5, 4, dtype=torch.float64)
    rows[3:] = torch.randn(2, 4, dtype=torch.float64)
    table, latent = Table(schedule, rows, uses_latent=True), torch.randn(6)
    ring = Ring(3, latent)
    for _ in range(3):
        ring.push(torch.randn(6))
    newest_first = [ring.features[slot] for slot in ring.order]
    for step in (3, 4):
        *weights, last = table.row(step).tolist()
        found = mix(ring.data, ring.order, weights, torch.empty(6), latent, last)
        assert torch.allclose(found.double(), table.apply(newest_first, step, latent), atol=1e-5)
