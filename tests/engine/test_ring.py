"""The ring holds the K newest features, bit for bit, in K features' memory."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lesa.engine.ring import Ring
from lesa.errors import LesaError


@given(history=st.integers(1, 8), pushes=st.integers(0, 25), reset_at=st.integers(0, 25))
@settings(deadline=None)
def test_order_lists_the_newest_features_first(history, pushes, reset_at):
    ring, model = Ring(history, torch.empty(2, 3)), deque(maxlen=history)
    for number in range(pushes):
        if number == reset_at:
            ring.reset()
            model.clear()
        ring.push(torch.full((2, 3), float(number)))
        model.appendleft(float(number))
    assert ring.count == len(model)
    found = [ring.features[slot][0, 0].item() for slot in ring.order[: ring.count]]
    assert found == list(model)
    assert ring.slots.tolist() == list(ring.order)
    assert ring.slots.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_is_k_features_written_in_place(dtype):
    feature = torch.randn(2, 63, 5).to(dtype)
    ring = Ring(3, feature)
    address = ring.data.data_ptr()
    for _ in range(7):
        ring.push(feature)
    assert ring.nbytes == 3 * feature.numel() * feature.element_size()
    assert ring.nbytes == ring.data.untyped_storage().nbytes()
    assert ring.data.data_ptr() == address
    assert all(torch.equal(slot, feature) for slot in ring.features)


def test_push_copies_also_from_a_view_that_changes_later():
    whole = torch.randn(4, 10, 3)
    view = whole[:, ::2]
    ring = Ring(2, view)
    ring.push(view)
    before = view.clone()
    whole.zero_()
    assert torch.equal(ring.features[ring.order[0]], before)


def test_written_in_and_out_of_inference_mode():
    with torch.inference_mode():
        ring = Ring(2, torch.ones(3))
        ring.push(torch.ones(3))
    ring.push(torch.zeros(3))
    with torch.inference_mode():
        ring.push(torch.full((3,), 2.0))
    assert ring.data.sum() == 6


def test_no_graph_is_kept():
    ring = Ring(1, torch.ones(3))
    ring.push(torch.ones(3, requires_grad=True) * 2)
    assert not ring.data.requires_grad


@pytest.mark.parametrize(
    "other", [torch.ones(4), torch.ones(3, dtype=torch.float64), torch.ones(3, device="meta")]
)
def test_another_kind_of_feature_is_refused(other):
    ring = Ring(2, torch.ones(3))
    assert not ring.matches(other)
    with pytest.raises(LesaError, match="make a new ring"):
        ring.push(other)


def test_history_below_one_is_refused():
    with pytest.raises(LesaError, match="history=0"):
        Ring(0, torch.ones(3))


def test_slot_numbers_are_copied_to_a_device_once(monkeypatch):
    first = Ring(5, torch.ones(3))
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("copied from the host"))
    with torch.inference_mode():
        second = Ring(5, torch.ones(4))
    for ring in (first, second, first):
        ring.push(torch.ones_like(ring.data[0]))
        assert ring.slots.tolist() == list(ring.order)
    assert first.order != second.order
