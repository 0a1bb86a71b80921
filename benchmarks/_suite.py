"""What the suites of pytest-benchmark share: where they run, and what they record beside times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from statistics import median
from typing import Any

import torch
from _timing import (
    LEAD_BYTES,
    Timer,
    graph_timer,
    interleaved,
    ratios,
    repeats,
    rotation,
    wall_timer,
)
from torch import Tensor

Call = Callable[[], Any]

CUDA = torch.cuda.is_available()
DEVICES = ("cuda", "cpu") if CUDA else ("cpu",)
BACKENDS = {"cuda": ("triton", "native", "eager"), "cpu": ("native", "eager")}
PLACES = [(device, backend) for device in DEVICES for backend in BACKENDS[device]]
CPU_CACHE = 32 << 20  # bytes; buffers that rotate outgrow three of them
ROUNDS = 9  # of the kernel and the copy, taking turns
LIMIT = 4e-3  # of a relative error in bf16; its rounding alone gives 1.7e-3


def label(place: tuple[str, str]) -> str:
    """How a place is called in the names of benchmarks."""
    return "-".join(place)


def synchronize(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def buffer_sets(nbytes: int, device: torch.device) -> int:
    """How many sets of buffers to rotate through, so that none is still in the cache."""
    on_gpu = device.type == "cuda"
    cache = torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else CPU_CACHE
    return rotation(nbytes, cache)


def in_turn(calls: Sequence[Call], device: torch.device) -> Call:
    """A function that makes the next call each time, and waits for the device."""
    turn = cycle(calls)

    def once() -> None:
        next(turn)()
        synchronize(device)

    return once


def relative_error(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||, NaN where anything is."""
    return float((found.double() - exact).norm() / exact.norm())


def share_of_copy(calls: Sequence[Call], nbytes: int, device: torch.device) -> float:
    """Time of a copy of as many bytes over the time of a call, median of ratios inside a round.

    Device time of CUDA graphs on a GPU, wall time elsewhere; both rotate through their buffers.
    """
    copies = _copies(nbytes, len(calls), device)
    timers = _timers({"calls": calls, "copy": copies}, nbytes, device)
    return ratios(interleaved(timers, ROUNDS), "copy", "calls")["median"]


def copy_seconds(nbytes: int, device: torch.device) -> float:
    """Wall time of a copy of `nbytes`, median; beside steps that no graph can repeat."""
    copies = _copies(nbytes, buffer_sets(nbytes, device), device)
    return median(interleaved({"copy": wall_timer(in_turn(copies, device))}, ROUNDS)["copy"])


def _copies(nbytes: int, count: int, device: torch.device) -> list[Call]:
    """Each moves `nbytes`, half read and half written, between buffers of its own."""
    half = max(1, nbytes // 2)
    pairs = [
        [torch.ones(half, dtype=torch.uint8, device=device) for _ in "ab"] for _ in range(count)
    ]
    return [lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs]


def _timers(
    contenders: dict[str, Sequence[Call]], nbytes: int, device: torch.device
) -> dict[str, Timer]:
    if device.type != "cuda":
        return {name: wall_timer(in_turn(calls, device)) for name, calls in contenders.items()}
    lead = torch.empty(LEAD_BYTES, dtype=torch.uint8, device=device)
    pool = torch.cuda.graph_pool_handle()
    return {
        name: graph_timer(calls, repeats(len(calls), nbytes), pool, lead)
        for name, calls in contenders.items()
    }
