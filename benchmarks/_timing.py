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
    timers: Mapping[str, Timer],
    rounds: int,
    *,
    warmup: int = 2,
    deadline: float | None = None,
    failures: dict[str, str] | None = None,
    each_round: Callable[[dict[str, list[float]]], Any] = lambda seconds: None,
) -> dict[str, list[float]]:
    """Seconds of every contender in every round, the same count for all that ran.

    After `deadline`, a value of `time.perf_counter`, nothing begins. With `failures` a contender
    that raises leaves, and so does one that the first round had no time for: they are missing in
    the result, and their reasons are written there. The first round keeps the order of `timers`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    gc.collect()
    gc.disable()
    try:
        for index in range(-warmup, rounds):
            names = list(seconds) if index <= 0 else random.sample(list(seconds), len(seconds))
            for name in names:
                if deadline is not None and time.perf_counter() > deadline and index >= 0:
                    return _complete(seconds, failures)
                try:
                    spent = timers[name]()
                except Exception as error:
                    if failures is None:
                        raise
                    failures[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                    del seconds[name]
                    continue
                if index >= 0:
                    seconds[name].append(spent)
            if index >= 0:
                each_round({name: [*found] for name, found in seconds.items()})
    finally:
        gc.enable()
    return _complete(seconds, failures)


def _complete(
    seconds: dict[str, list[float]], failures: dict[str, str] | None
) -> dict[str, list[float]]:
    """The rounds that all have finished; without those that have not finished one."""
    for name in [name for name, found in seconds.items() if not found]:
        if failures is None:
            raise TimeoutError(f"no time was left for the first round of {name!r}")
        failures[name] = "no time left"
        del seconds[name]
    rounds = min(map(len, seconds.values()), default=0)
    return {name: found[:rounds] for name, found in seconds.items()}


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
