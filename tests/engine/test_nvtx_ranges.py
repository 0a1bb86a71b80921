"""Ranges of a profiler's timeline, with a stand-in for nvtx: no profiler listens in a test."""

from __future__ import annotations

import importlib.util
import sys
import threading
from types import SimpleNamespace

import pytest

from lesa.engine import nvtx_ranges

NAMES = ("full", "push", "mix", "spline_mix", "tail", "capture", "replay")


class Domain:
    """What ranges asks of nvtx's domain; open ranges per thread, as NVTX keeps them."""

    def __init__(self):
        self.made, self.log, self.local = [], [], threading.local()

    def get_event_attributes(self, *, message, color, category):
        self.made.append((message, category))
        return message

    def push_range(self, event):
        self.local.open = [*self.open, event]
        self.log.append(event)

    def pop_range(self):
        self.local.open = self.open[:-1]
        self.log.append("end")

    @property
    def open(self):
        return getattr(self.local, "open", [])


@pytest.fixture
def domain(monkeypatch):
    found = Domain()

    def get_domain(name):
        assert name == "lesa"
        return found

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(get_domain=get_domain))
    monkeypatch.delenv("LESA_NVTX", raising=False)
    return found


def names_of(built):
    return {name: type(part).__name__ for name, part in zip(NAMES, built, strict=True)}


def test_events_are_built_once_and_only_pushed_afterwards(domain):
    built = nvtx_ranges.build()
    assert built._fields == NAMES and len(domain.made) == len(set(domain.made)) == 7
    for _ in range(3):
        with built.mix:
            assert domain.open == ["mix"]
    assert domain.log == ["mix", "end"] * 3 and len(domain.made) == 7


def test_every_range_has_its_own_message(domain):
    for part in nvtx_ranges.build():
        with part:
            pass
    messages = [event for event in domain.log if event != "end"]
    assert messages == ["full step", "push", "mix", "spline_mix", "tail", "capture", "replay"]
    assert dict(domain.made)["replay"] == "graph" and dict(domain.made)["mix"] == "step"


def test_one_object_may_be_nested_in_itself(domain):
    mix = nvtx_ranges.build().mix
    with mix, mix:
        assert domain.open == ["mix", "mix"]
    assert domain.open == []


def test_an_exception_ends_the_range_and_goes_on(domain):
    built = nvtx_ranges.build()
    with pytest.raises(ZeroDivisionError), built.full, built.mix:
        _ = 1 / 0
    assert domain.open == [] and domain.log == ["full step", "mix", "end", "end"]


def test_threads_share_one_object(domain):
    mix, meet, seen = nvtx_ranges.build().mix, threading.Barrier(4), []

    def work():
        with mix:
            meet.wait(10)  # all four are inside
            seen.append(domain.open)
        seen.append(domain.open)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [[]] * 4 + [["mix"]] * 4


def test_off_by_the_environment(domain, monkeypatch):
    monkeypatch.setenv("LESA_NVTX", "0")
    assert set(names_of(nvtx_ranges.build()).values()) == {"Range"} and not domain.made


def test_off_without_nvtx(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)  # importing it raises ImportError
    built = nvtx_ranges.build()
    assert set(names_of(built).values()) == {"Range"}
    with pytest.raises(KeyError), built.mix, built.mix:
        raise KeyError


@pytest.mark.skipif(importlib.util.find_spec("nvtx") is None, reason="nvtx is not installed")
def test_the_real_nvtx_takes_the_calls(monkeypatch):
    """Its domain as a profiler would get it; without one the events go nowhere."""
    from nvtx._lib.lib import Domain as Real
    from nvtx._lib.lib import DomainHandle

    monkeypatch.delenv("LESA_NVTX", raising=False)
    domain = object.__new__(Real)
    domain.handle, domain.categories = DomainHandle("lesa"), {}
    monkeypatch.setattr("nvtx.get_domain", lambda name: domain)
    built = nvtx_ranges.build()
    assert "Range" not in names_of(built).values()
    for part in built:
        with part, built.mix:
            pass
    assert domain.categories == {"step": 1, "graph": 2}
