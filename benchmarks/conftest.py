"""What the suites share; scripts and suites import their helpers as if they were run from here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from native_build import native_kernels as native_kernels

from lesa.ops import backend

sys.path.insert(0, str(Path(__file__).parent))

TIMED_BY = ("only", "enable", "json", "save", "autosave", "save_data", "compare", "histogram")


class Place(NamedTuple):
    """Where a benchmark runs, and which implementation of the kernels is at work there."""

    device: torch.device
    backend: str


@pytest.fixture
def benchmark(benchmark: Any, pytestconfig: pytest.Config) -> Any:
    """Times only where an option of pytest-benchmark asks for it, else calls once as a test."""
    asked = any(pytestconfig.getoption(f"benchmark_{name}") for name in TIMED_BY)
    benchmark.disabled = benchmark.disabled or not asked
    return benchmark


@pytest.fixture
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A device and the backend forced on it; skips, with the reason, a backend not there."""
    kind, name = request.param
    if (kind, name) == ("cpu", "native"):
        request.getfixturevalue("native_kernels")
    if reason := backend.why_not(name, kind):
        pytest.skip(reason)
    monkeypatch.setenv(backend.VARIABLE, name)
    return Place(torch.device(kind), name)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On a CPU: small models gain nothing from more, and wait for a busy neighbour with each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
