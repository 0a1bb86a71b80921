"""A plan's forecasts, on each backend, against the table's own float64 mix."""

from __future__ import annotations

import pytest
import torch

from lesa import Schedule, Table
from lesa.mixer import Mixer
from lesa.plan import Plan
from lesa.ring import Ring


def table(uses_latent: bool, bias: bool) -> Table:
    schedule = Schedule.explicit([0, 1, 4], 7)
    rows = torch.zeros(7, 3 + uses_latent, dtype=torch.float64)
    for step in schedule.skipped_steps:
        held = len(schedule.cached_before(step, 3))
        rows[step, :held] = torch.linspace(1.5, -0.5, held)
        if uses_latent:
            rows[step, -1] = 0.25
    shift = torch.zeros(7, dtype=torch.float64)
    shift[list(schedule.skipped_steps)] = 0.125
    return Table(schedule, rows, uses_latent, shift if bias else None)


@pytest.mark.parametrize("name", ["eager", "native"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("uses_latent", "bias"), [(False, False), (True, True)])
def test_forecasts(name, dtype, uses_latent, bias, request, monkeypatch):
    if name == "native":
        request.getfixturevalue("native_kernels")
    monkeypatch.setenv("LESA_BACKEND", name)
    made = table(uses_latent, bias)
    plan, ring = Plan(made), Ring(3, torch.empty(2, 33, dtype=dtype))
    ring.data.fill_(float("nan"))  # what no full step has filled yet must not be read
    mixer, generator = Mixer(plan, ring), torch.Generator().manual_seed(0)
    for step in range(7):
        if made.schedule.is_full(step):
            ring.push(torch.randn(2, 33, generator=generator).to(dtype))
            continue
        latent = torch.randn(33, 2, generator=generator).to(dtype).T if uses_latent else None
        out = torch.full((2, 33), float("nan"), dtype=dtype)
        newest_first = [ring.features[slot] for slot in ring.order]
        assert mixer(step, out, latent) is out
        exact = made.apply(newest_first, step, latent)
        eps = max(torch.finfo(dtype).eps, 1e-15)
        torch.testing.assert_close(out.double(), exact, rtol=eps, atol=4 * eps)


def test_rows_are_copied_to_a_device_once():
    plan = Plan(table(True, True))
    on_device = plan.on(torch.device("cpu"))
    assert plan.on(torch.device("cpu")) is on_device
    assert on_device.coefficients.dtype == torch.float32 and len(on_device.steps) == 7
    assert on_device.bias is not None and on_device.bias.shape == (7,)
