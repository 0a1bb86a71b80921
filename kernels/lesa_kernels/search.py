"""Which launch configuration of a kernel is the fastest on a device."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

from lesa_kernels.config import Config
from lesa_kernels.errors import LesaError
from lesa_kernels.examples import Example

__all__ = ["CANDIDATES", "Timer", "by_the_clock", "replayed", "search"]

CANDIDATES = tuple(
    Config(block, threads, programs)
    for threads in (64, 128, 256)
    for block in (8 * threads, 16 * threads, 32 * threads)  # one to four loads of 128 bits in bf16
    for programs in (2, 4, 8, 16, 32)
    if 256 <= threads * programs <= 4096  # what is resident, and up to twice as many
)
ROUNDS, FINALISTS = 5, 6
COMPILERS = 4  # threads: the compiler holds the interpreter's lock for about half of its time
Timer = Callable[[Callable[[], Any]], float]


def search(
    example: Example,
    timer: Timer,
    candidates: Sequence[Config] = CANDIDATES,
    rounds: int = ROUNDS,
    deadline: float = math.inf,
) -> tuple[Config, float]:
    """The candidate with the smallest median time, and that time in the timer's unit.

    All are timed once, then the fastest take turns, in a new order every round. What needs more
    than the device has is left out; past the `deadline` (of time.monotonic) no round begins.

    Raises:
        LesaError: one of them gives another result than the default configuration.
    """
    example.run()
    expected = example.result.double()
    times: dict[Config, list[float]] = {}
    for config in _launchable(example, candidates):
        example.result.zero_()
        example.run(config)
        if not torch.allclose(example.result.double(), expected, rtol=0.02, atol=0.02):
            raise LesaError(f"{example.kernel} is wrong with {config}; report this as a bug")
        times[config] = [timer(partial(example.run, config))]
        if time.monotonic() > deadline:
            break
    finalists = sorted(times, key=lambda config: times[config][0])[:FINALISTS]
    for _ in range(rounds - 1):
        if time.monotonic() > deadline:
            break
        for config in random.sample(finalists, len(finalists)):
            times[config].append(timer(partial(example.run, config)))
    medians = {config: statistics.median(times[config]) for config in finalists}
    best = min(medians, key=medians.__getitem__)
    return best, medians[best]


def _launchable(example: Example, candidates: Sequence[Config]) -> list[Config]:
    """The candidates that the device can hold; on a GPU they are compiled side by side."""

    def runs(config: Config) -> bool:
        try:
            example.run(config)
        except OutOfResources:
            return False
        return True

    device = example.result.device
    if device.type != "cuda":
        return [config for config in candidates if runs(config)]
    with ThreadPoolExecutor(COMPILERS, initializer=partial(torch.cuda.set_device, device)) as pool:
        return [c for c, true in zip(candidates, pool.map(runs, candidates), strict=True) if true]


def replayed(run: Callable[[], Any]) -> float:
    """Milliseconds of `run` on the device, the L2 cache cleared before; as a graph, since a launch
    from Python takes longer than a small kernel runs."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return triton.testing.do_bench(graph.replay, warmup=1, rep=10, return_mode="median")


def by_the_clock(run: Callable[[], Any]) -> float:
    """Milliseconds of the host."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)
