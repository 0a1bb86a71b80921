"""Interleaved timing: every round runs all contenders once, in random order.

So a neighbour's load or a falling clock hits all of them, and ratios are taken inside a round.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from statistics import median, quantiles
from typing import Any

import torch

Run = Callable[[], Any]
Timer = Callable[[], float]  # runs its contender once and says how many seconds that took

LEAD_BYTES = 512 << 20  # written before every timed replay: clears the L2, keeps the GPU busy
TRAFFIC = 4 << 30  # bytes of one timed replay: about a millisecond, where 10 us more are 1 %
MOST_CALLS = 512


def interleaved(
    timers: Mapping[str, Timer], rounds: int, *, warmup: int = 2, deadline: float | None = None
) -> dict[str, list[float]]:
    """Seconds of every contender in every round, the same count for all; at least one round.

    No round begins after `deadline`, a value of `time.perf_counter`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    gc.collect()
    gc.disable()
    try:
        for index in range(-warmup, rounds):
            if index > 0 and deadline is not None and time.perf_counter() > deadline:
                break
            for name in random.sample(list(timers), len(timers)):
                spent = timers[name]()
                if index >= 0:
                    seconds[name].append(spent)
    finally:
        gc.enable()
    return seconds


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and count."""
    low, _, high = quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": median(values), "quartiles": [low, high], "rounds": len(values)}


def ratios(seconds: Mapping[str, Sequence[float]], over: str, under: str) -> dict[str, Any]:
    """Summary of over / under, taken inside each round."""
    return summary([a / b for a, b in zip(seconds[over], seconds[under], strict=True)])


def rotation(nbytes: int, l2_bytes: int) -> int:
    """How many sets of buffers to rotate through: at least two, together three caches or more."""
    return max(2, ceil(3 * l2_bytes / max(nbytes, 1)))


def repeats(sets: int, nbytes: int) -> int:
    """How often to go round the sets in one timed replay."""
    return max(1, min(ceil(TRAFFIC / (sets * nbytes)), MOST_CALLS // sets))


def wall_timer(run: Run, synchronize: Run = lambda: None) -> Timer:
    """Host seconds of one run, with nothing under way before it or after it."""

    def time_once() -> float:
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - start

    return time_once


def graph_timer(calls: Sequence[Run], rounds: int, pool: Any, lead: torch.Tensor) -> Timer:
    """Device seconds of one call: `rounds` times all calls in one CUDA graph, without launch gaps.

    `lead` is written first, so that the replay is queued before its turn comes. Graphs that share
    the `pool` (`torch.cuda.graph_pool_handle()`) share the memory of their temporaries.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in (*calls, *calls):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for _ in range(rounds):
            for run in calls:
                run()
    return _event_timer(graph.replay, len(calls) * rounds, lead)


def launch_timer(calls: Sequence[Run], lead: torch.Tensor) -> Timer:
    """Seconds of one call as Python makes them: the slower of host and device."""

    def once() -> None:
        for run in calls:
            run()

    return _event_timer(once, len(calls), lead)


def _event_timer(run: Run, count: int, lead: torch.Tensor) -> Timer:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time_once() -> float:
        lead.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    return time_once
