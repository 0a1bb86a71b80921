"""The csrc mix against eager and memcpy: `python benchmarks/bench_mix_cpu.py`; a minute when quiet.

Every round runs all contenders once in random order and ratios are taken inside the round, so that
a neighbour's load hits both sides. Bytes moved: K features read and one written; memcpy reads half
of as many and writes half. Writes benchmarks/results/mix_cpu.json. A share of memcpy's bandwidth
is worth quoting at a load below 0.5 only; the load is in the JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from lesa import native, ops
from lesa.versions import versions

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EAGER = ops.mix  # what runs where nothing is built
RESULT = Path(__file__).parent / "results" / "mix_cpu.json"


def environment(threads: int) -> dict[str, Any]:
    """Whatever the numbers depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULT.parent
    )
    models = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "processor": models[0].partition(": ")[2] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "instruction_set": native.isa(),
        "load": os.getloadavg(),
        "versions": versions(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def memcpy(pool: ThreadPoolExecutor, size: int, threads: int) -> Callable[[], None]:
    """Moves `size` bytes, half read and half written, in equal parts per thread."""
    source, target = (torch.ones(size // 2, dtype=torch.uint8) for _ in range(2))
    part = size // 2 // threads
    starts = [(target.data_ptr() + i * part, source.data_ptr() + i * part) for i in range(threads)]

    def run(_keep: Any = (source, target)) -> None:
        for done in [pool.submit(ctypes.memmove, to, start, part) for to, start in starts]:
            done.result()

    return run


def check(out: Tensor, ring: Tensor, coefficients: list[float]) -> None:
    """No speed-up is printed over a wrong result."""
    parts = [c * feature.double() for c, feature in zip(coefficients, ring, strict=True)]
    exact, magnitude = sum(parts), sum(part.abs() for part in parts)
    allowed = torch.finfo(ring.dtype).eps * exact.abs() + 1e-6 * magnitude
    if not bool(((out.double() - exact).abs() <= allowed).all()):
        raise SystemExit(f"the csrc mix is wrong in {ring.dtype}: nothing was timed")


def contenders(
    ring: Tensor, pool: ThreadPoolExecutor, options: argparse.Namespace
) -> dict[str, Callable[[], Any]]:
    """Functions of no argument, each of which moves as many bytes as the mix."""
    history, feature = len(ring), ring[0]
    order, weights = list(range(history)), [1.75, -1.0, 0.25, *[0.125] * history][:history]
    slots, coefficients = torch.tensor(order).int(), torch.tensor(weights)
    out, other = torch.full_like(feature, float("nan")), torch.empty_like(feature)
    mix = torch.ops.lesa_native.mix_out.default
    size = (history + 1) * feature.numel() * feature.element_size()
    half = torch.empty(size // 2, dtype=torch.uint8), torch.ones(size // 2, dtype=torch.uint8)
    mix(ring, slots, coefficients, None, 0.0, 0.0, out)
    check(out, ring, weights)
    found: dict[str, Callable[[], Any]] = {
        "csrc": lambda: mix(ring, slots, coefficients, None, 0.0, 0.0, out),
        "csrc in place": lambda: mix(ring, slots, coefficients, None, 0.0, 0.0, feature),
        "eager": lambda: EAGER(ring, order, weights, other),
        "memcpy": memcpy(pool, size, options.threads),
        "torch copy_": lambda: half[0].copy_(half[1]),
    }
    if options.compile:
        compiled = torch.compile(lambda: _plain(ring, weights).to(ring.dtype), fullgraph=True)
        found["torch.compile"] = compiled
    return found


def _plain(ring: Tensor, weights: list[float]) -> Tensor:
    total = ring[0].float() * weights[0]
    for feature, weight in zip(ring[1:], weights[1:], strict=True):
        total = total + feature.float() * weight
    return total


def rounds(functions: dict[str, Callable[[], Any]], count: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for index in range(count + 2):  # two to warm up
        random.shuffle(names)
        for name in names:
            start = time.perf_counter()
            functions[name]()
            if index > 1:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(
    dtype: torch.dtype, pool: ThreadPoolExecutor, options: argparse.Namespace
) -> dict[str, Any]:
    """One row: best times, and medians of the ratios to csrc inside each round."""
    shape = [int(size) for size in options.shape.split(",")]
    generator = torch.Generator().manual_seed(0)
    ring = torch.randn(options.history, *shape, generator=generator).to(dtype)
    with torch.inference_mode():
        seconds = rounds(contenders(ring, pool, options), options.rounds)
    size = (options.history + 1) * ring[0].numel() * ring.element_size()
    pairs = {name: zip(times, seconds["csrc"], strict=True) for name, times in seconds.items()}
    over = {name: sorted(time / ours for time, ours in pair) for name, pair in pairs.items()}
    best_copy = [min(pair) for pair in zip(seconds["memcpy"], seconds["torch copy_"], strict=True)]
    share = [copy / ours for copy, ours in zip(best_copy, seconds["csrc"], strict=True)]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "shape": shape,
        "history": options.history,
        "bytes": size,
        "milliseconds": {name: 1e3 * median(times) for name, times in seconds.items()},
        "best_milliseconds": {name: 1e3 * min(times) for name, times in seconds.items()},
        "gigabytes_per_second": {name: size / 1e9 / median(t) for name, t in seconds.items()},
        "time_over_csrc": {name: median(ratios) for name, ratios in over.items()},
        "quartiles_over_csrc": {n: quantiles(ratios, n=4)[::2] for n, ratios in over.items()},
        "share_of_memcpy_bandwidth": median(share),
    }


def show(row: dict[str, Any]) -> None:
    shape = "x".join(map(str, row["shape"]))
    print(f"\n{row['dtype']} [{shape}], K = {row['history']}, {row['bytes'] / 1e6:.0f} MB moved")
    for name, time_over in row["time_over_csrc"].items():
        low, high = row["quartiles_over_csrc"][name]
        milliseconds, rate = row["milliseconds"][name], row["gigabytes_per_second"][name]
        times = f"{milliseconds:9.3f} ms {rate:7.1f} GB/s"
        print(f"{name:14} {times} {time_over:7.2f} x csrc's time ({low:.2f} - {high:.2f})")
    print(f"csrc reaches {row['share_of_memcpy_bandwidth']:.0%} of the faster copy's bandwidth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1,4096,3072", help="of a feature")
    parser.add_argument("--history", type=int, default=3, help="features mixed, 1 to 16")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile too; needs a compiler"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if reason := native.why_not("cpu"):
        raise SystemExit(f"nothing to measure: {reason}")
    torch.set_num_threads(options.threads)
    facts = environment(options.threads)
    with ThreadPoolExecutor(options.threads) as pool:
        rows = [measure(dtype, pool, options) for dtype in DTYPES]
    for row in rows:
        show(row)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n")
    print(f"\n{options.output}, {facts['processor']}, load {facts['load'][0]:.2f}")


if __name__ == "__main__":
    main()
