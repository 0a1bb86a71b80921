"""A plan's forecasts, on each backend, against the table's own float64 mix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paper_form import STEPS, gated_table

from lesa import Schedule, Table, ops
from lesa.engine.mixer import Mixer
from lesa.engine.ring import Ring
from lesa.engine.step_table import StepTable
from lesa.errors import LesaError


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
    plan, ring = StepTable(made), Ring(3, torch.empty(2, 33, dtype=dtype))
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


@pytest.mark.parametrize("name", ["eager", "native"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_papers_form(name, dtype, request, monkeypatch):
    """Its gate is evaluated in the kernel where there is one, and equals the table's rows."""
    if name == "native":
        request.getfixturevalue("native_kernels")
    monkeypatch.setenv("LESA_BACKEND", name)
    made = gated_table()
    plan, ring = StepTable(made), Ring(3, torch.empty(2, 33, dtype=dtype))
    mixer, generator = Mixer(plan, ring), torch.Generator().manual_seed(0)
    kernel = name == "native" and dtype != torch.float64
    assert type(mixer.writer).__name__ == ("_NativeGated" if kernel else "_Eager")
    gates = made.coefficients[3:, 0] - 1
    assert gates.abs().max() > 0.05
    for step in range(STEPS):
        feature = torch.randn(2, 33, generator=generator).to(dtype)
        if not made.schedule.is_full(step):
            newest_first = [ring.features[slot] for slot in ring.order]
            found = mixer(step, torch.full((2, 33), float("nan"), dtype=dtype))
            exact = made.apply(newest_first, step)
            eps = torch.finfo(dtype).eps if dtype == torch.float64 else 2e-6
            eps = max(torch.finfo(dtype).eps, eps)
            torch.testing.assert_close(found.double(), exact, rtol=4 * eps, atol=8 * eps)
        if plan.pushes[step]:
            ring.push(feature)


@pytest.mark.parametrize("fields", [{"gate": "mlp"}, {"spline": "edge"}])
def test_a_gate_that_is_not_made_of_ridges_is_run_as_a_table(fields):
    assert gated_table().gated is not None and gated_table(**fields).gated is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_guidance_parts_have_rows_of_their_own(dtype):
    shared, generator = table(True, True), torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, -0.5])
    made = replace(shared, split=shared.coefficients[..., None] * scale)
    feature, latent = (torch.randn(4, 33, generator=generator).to(dtype) for _ in range(2))
    ring = Ring(3, feature)
    for _ in range(3):
        ring.push(torch.randn(4, 33, generator=generator).to(dtype))
    newest_first = [ring.features[slot] for slot in ring.order]
    exact = torch.cat(
        [
            made.part(p).apply([f.chunk(2)[p] for f in newest_first], 5, latent.chunk(2)[p])
            for p in range(2)
        ]
    )
    eps = max(torch.finfo(dtype).eps, 1e-15)
    found = Mixer(StepTable(made, 2), ring)(5, torch.empty_like(feature), latent)
    torch.testing.assert_close(found.double(), exact, rtol=eps, atol=4 * eps)
    # As the kernels get it: a part is a band as long as a part of the batch.
    rows = StepTable(made, 2).on(torch.device("cpu"))
    given = ring.data, ring.slots, rows.coefficients, rows.steps[5], torch.empty_like(feature)
    found = ops.mix(*given, latent=latent, bias=rows.bias, band_size=66)
    torch.testing.assert_close(found.double(), exact, rtol=max(eps, 1e-6), atol=max(eps, 1e-6))
    one = Mixer(StepTable(made), ring)(5, torch.empty_like(feature), latent)  # parts not known
    assert torch.equal(one, Mixer(StepTable(shared), ring)(5, torch.empty_like(feature), latent))
    with pytest.raises(LesaError, match="batch=4: it does not hold 3"):
        three = replace(shared, split=shared.coefficients[..., None].repeat(1, 1, 3))
        Mixer(StepTable(three, 3), ring)


def test_rows_are_copied_to_a_device_once():
    plan = StepTable(table(True, True))
    on_device = plan.on(torch.device("cpu"))
    assert plan.on(torch.device("cpu")) is on_device
    assert on_device.coefficients.dtype == torch.float32 and len(on_device.steps) == 7
    assert on_device.bias is not None and on_device.bias.shape == (7,)
