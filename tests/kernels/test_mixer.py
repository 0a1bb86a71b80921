"""The mixer's prepared launches: what the ordinary ones write, and nothing kept beside the ring."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from paper_form import STEPS, gated_table

from lesa import Schedule, Table
from lesa.engine.mixer import Mixer
from lesa.engine.modulation import Modulation
from lesa.engine.ring import Ring
from lesa.engine.step_table import StepTable

FULL = (0, 1, 4)


def made(device, monkeypatch, uses_latent=False, bias=False, parts=1):
    """A table, and the mixers of both backends over one ring of 3 features [4, 5, 16]."""
    schedule = Schedule.explicit(FULL, 7)
    rows = torch.zeros(7, 3 + uses_latent, dtype=torch.float64)
    for step in schedule.skipped_steps:
        held = len(schedule.cached_before(step, 3))
        rows[step, :held] = torch.linspace(1.5, -0.5, held)
        rows[step, 3:] = 0.25
    shift = torch.zeros(7, dtype=torch.float64)
    shift[list(schedule.skipped_steps)] = 0.125
    split = rows[..., None] * torch.linspace(1.0, -0.5, parts) if parts > 1 else None
    table = Table(schedule, rows, uses_latent, shift if bias else None, split=split)
    ring = Ring(3, torch.empty(4, 5, 16, device=device))
    plan, mixers = StepTable(table, parts), []
    for backend in ("triton", "eager"):
        monkeypatch.setenv("LESA_BACKEND", backend)
        mixers.append(Mixer(plan, ring))
    return ring, mixers


def draw(device, *shape):
    return torch.randn(*shape, device=device)


@pytest.mark.parametrize(
    ("uses_latent", "bias", "parts"), [(False, False, 1), (True, True, 1), (True, False, 2)]
)
def test_every_skipped_step_is_what_eager_gives(device, monkeypatch, uses_latent, bias, parts):
    ring, (mixer, eager) = made(device, monkeypatch, uses_latent, bias, parts)
    assert [type(each.writer).__name__ for each in (mixer, eager)] == [
        "_Triton",
        "_Eager" if parts == 1 else "_EagerParts",
    ]
    for step in range(7):
        if step in FULL:
            ring.push(draw(device, 4, 5, 16))
            continue
        latent = draw(device, 4, 5, 16) if uses_latent else None
        found = mixer(step, torch.full_like(ring.features[0], torch.nan), latent)
        wanted = eager(step, torch.full_like(ring.features[0], torch.nan), latent)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_the_papers_gate_is_evaluated_in_the_kernel(device, monkeypatch):
    table = gated_table()
    ring, mixers = Ring(3, torch.empty(2, 5, 16, device=device)), []
    for backend in ("triton", "eager"):
        monkeypatch.setenv("LESA_BACKEND", backend)
        mixers.append(Mixer(StepTable(table), ring))
    mixer, eager = mixers
    assert [type(each.writer).__name__ for each in (mixer, eager)] == ["_TritonGated", "_Eager"]
    for step in range(STEPS):
        if not table.schedule.is_full(step):
            found = mixer(step, torch.full_like(ring.features[0], torch.nan))
            wanted = eager(step, torch.full_like(ring.features[0], torch.nan))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        ring.push(draw(device, 2, 5, 16))


@pytest.mark.parametrize("bias", [False, True])
def test_every_modulated_step_is_what_eager_gives(device, monkeypatch, bias):
    ring, (mixer, eager) = made(device, monkeypatch, bias=bias)
    modulation = Modulation.of(draw(device, 7, 4, 32))
    for step in range(7):
        if step in FULL:
            ring.push(draw(device, 4, 5, 16))
            continue
        found, wanted = (torch.full_like(ring.features[0], torch.nan) for _ in range(2))
        feature = torch.full_like(found, torch.nan) if step > 4 else None
        mixer.modulated(step, modulation, 1e-6, found, feature)
        eager.modulated(step, modulation, 1e-6, wanted)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        if feature is not None:
            expected = eager(step, torch.empty_like(feature))
            torch.testing.assert_close(feature, expected, rtol=1e-6, atol=1e-6)


def test_the_ring_goes_with_its_mixer(device, monkeypatch):
    ring, (mixer, eager) = made(device, monkeypatch)
    for _ in range(2):
        ring.push(draw(device, 4, 5, 16))
    modulation = Modulation.of(draw(device, 7, 4, 32))
    mixer(2, torch.empty_like(ring.features[0]))
    mixer.modulated(2, modulation, 1e-6, torch.empty_like(ring.features[0]))
    data = weakref.ref(ring.data)
    gc.collect()
    gc.disable()
    try:
        del ring, mixer, eager
        assert data() is None
    finally:
        gc.enable()
