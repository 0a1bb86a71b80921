"""Memory for rings: what is lent, what comes back, and what happens where there is no room."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import torch

import lesa
from lesa import LesaError, Schedule, Taylor
from lesa.engine.pool import _GRACE, Lease, Pool

FEATURE = torch.zeros(2, 3)
RING = 2 * FEATURE.numel() * 4  # of two features


class Owner:
    """Holds a lease, as a trajectory does."""

    def __init__(self, pool):
        self.lost = 0
        own = weakref.ref(self)
        self.lease = Lease(pool, lambda: own() and own().lose())

    def lose(self):
        self.lost += 1

    def take(self, history=2):
        return self.lease.take(history, FEATURE)


def test_without_a_limit_it_counts_and_keeps_nothing():
    pool = Pool()
    owner = Owner(pool)
    data = weakref.ref(owner.take())
    assert pool.state() == (RING, 0, 0, 0, 0)
    owner.lease.end()
    assert data() is None and pool.state() == (0, 0, 0, 0, 0)


def test_memory_comes_back_with_the_owner_itself():
    pool = Pool(RING)
    owner = Owner(pool)
    assert owner.take() is not None
    del owner
    assert pool.state().used == pool.state().idle == 0


def test_memory_that_the_device_does_not_have_is_not_counted():
    """Else a server that once ran out of memory would find no room any more."""
    pool = Pool(2**62)
    owner = Owner(pool)
    with pytest.raises(RuntimeError, match="allocate"):
        owner.take(history=2**48)
    assert pool.state().used == 0 and not pool._live


def test_memory_waits_for_a_ring_of_its_layout():
    pool = Pool(2 * RING)
    first, second, other = (Owner(pool) for _ in range(3))
    place = first.take().data_ptr()
    first.lease.end()
    assert pool.state()[:2] == (0, RING)
    assert second.take().data_ptr() == place
    second.lease.end()
    assert other.take(history=1).data_ptr() != place
    assert pool.state()[:2] == (RING // 2, RING)


def test_idle_memory_makes_room_the_oldest_first():
    pool = Pool(2 * RING)
    a, b, c = (Owner(pool) for _ in range(3))
    places = [a.take().data_ptr(), b.take().data_ptr()]
    a.lease.end()
    b.lease.end()
    assert c.take(history=1) is not None  # takes the place of a's
    assert pool.state()[:2] == (RING // 2, RING)
    assert Owner(pool).take().data_ptr() == places[1]


def test_a_ring_in_use_is_not_taken_away_and_one_that_stopped_is():
    pool = Pool(2 * RING)
    stopped, working, new = (Owner(pool) for _ in range(3))
    assert stopped.take() is not None and working.take() is not None
    assert new.take() is None and pool.state().refused == 1
    for _ in range(2 * _GRACE):
        working.lease.touch()
    assert new.take() is not None
    assert (stopped.lost, working.lost) == (1, 0)
    assert pool.state() == (2 * RING, 0, 2 * RING, 1, 1)


def test_a_ring_above_the_limit_finds_no_room():
    pool = Pool(RING - 1)
    assert Owner(pool).take() is None
    assert pool.state().used == 0


@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_the_ring_goes_back_at_the_last_skipped_step(tiny_flux, inputs, tap):
    lesa.enable(
        tiny_flux, Taylor(1), schedule=Schedule.explicit([0, 1, 11]), tap=tap, memory_limit=2**20
    )
    found = []

    def note(pipe, i, t, values):
        found.append(lesa.stats(pipe).pool)
        return values

    tiny_flux(**inputs(callback_on_step_end=note))
    size = lesa.stats(tiny_flux).ring_bytes
    assert [each["used"] for each in found] == [size] * 10 + [0, 0]
    assert [each["idle"] for each in found] == [0] * 10 + [size, size]
    first = tiny_flux(**inputs()).images
    assert torch.equal(tiny_flux(**inputs()).images, first)  # in memory that was used before
    assert lesa.stats(tiny_flux).pool["idle"] == size


def test_a_run_that_finds_no_room_is_full_and_says_why(tiny_flux, inputs):
    plain = tiny_flux(**inputs()).images
    lesa.enable(tiny_flux, Taylor(1), schedule=Schedule.explicit([0, 1]), memory_limit=100)
    assert torch.equal(tiny_flux(**inputs()).images, plain)
    found = lesa.stats(tiny_flux)
    assert found.skipped == 0
    assert any("memory_limit" in reason for reason in found.fallbacks)
    numbers = found.as_dict()
    assert numbers['lesa_pool_rings_total{event="refused"}'] > 0
    assert numbers['lesa_pool_bytes{state="limit"}'] == 100
    gc.collect()
    assert lesa.stats(tiny_flux).pool["used"] == 0


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "1GB"])
def test_a_limit_is_a_number_of_bytes(tiny_flux, limit):
    with pytest.raises(LesaError, match="memory_limit="):
        lesa.enable(tiny_flux, memory_limit=limit)


def test_the_names_are_those_that_prometheus_reads(tiny_flux, inputs):
    lesa.enable(tiny_flux, Taylor(1), schedule=Schedule.explicit([0, 1]))
    with torch.enable_grad():
        tiny_flux(**inputs(steps=3))
    stats = lesa.stats(tiny_flux)
    stats.fallbacks['a "quoted" \\ reason\n'] = 2
    sample = re.compile(r'[a-z_]+(\{[a-z]+="([^"\\\n]|\\["\\n])*"\})?')
    assert all(sample.fullmatch(name) for name in stats.as_dict())
    assert stats.as_dict()['lesa_calls_total{kind="skipped"}'] == stats.skipped == 1
