"""The csrc mix against eager and memcpy: `python benchmarks/bench_mix_cpu.py`; a minute when quiet.

Every round runs all contenders once in random order and ratios are taken inside the round, so that
a neighbour's load hits both sides. Bytes moved: K features read and one written; memcpy reads half
of as many and writes half. Writes benchmarks/results/mix_cpu.json. A share of memcpy's bandwidth
is worth quoting at a load below 0.5 only; the load is in the JSON.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from _environment import RESULTS, environment, write
from _timing import interleaved, wall_timer
from torch import Tensor

from lesa.ops import eager, native

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
        "eager": lambda: eager.mix_row(ring, order, weights, other),
        "plain formula": lambda: _plain(ring, weights).to(ring.dtype),
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


def measure(
    dtype: torch.dtype, pool: ThreadPoolExecutor, options: argparse.Namespace
) -> dict[str, Any]:
    """One row: best times, and medians of the ratios to csrc inside each round."""
    shape = [int(size) for size in options.shape.split(",")]
    generator = torch.Generator().manual_seed(0)
    ring = torch.randn(options.history, *shape, generator=generator).to(dtype)
    with torch.inference_mode():
        runs = contenders(ring, pool, options)
        timers = {name: wall_timer(run) for name, run in runs.items()}
        seconds = interleaved(timers, options.rounds)
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
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of mix_cpu.json")
    options = parser.parse_args()
    if reason := native.why_not("cpu"):
        return print(f"nothing to measure: {reason}")
    torch.set_num_threads(options.threads)
    facts = environment()
    with ThreadPoolExecutor(options.threads) as pool:
        rows = [measure(dtype, pool, options) for dtype in DTYPES]
    for row in rows:
        show(row)
    path = options.out / "mix_cpu.json"
    write(path, {"environment": facts, "rows": rows})
    print(f"\n{path}, {facts['processor']}, load {facts['load'][0]:.2f}")


if __name__ == "__main__":
    main()
