"""Every kernel against its alternatives: `python benchmarks/bench_kernels.py`; 3 minutes on a GPU.

Triton, csrc where built, eager, torch.compile of the same formula, TaylorSeer's update, and two
kinds of copy of as many bytes, at the features of three models in bf16. Device times are of CUDA
graphs that rotate through buffers of three L2 caches or more; `launched` is the same call as Python
makes it. Writes kernels_<device>.json after each row. Without a GPU it times nothing, and writes
what can be counted and compiled into kernels_analytic.json.

For one's own records there are suites of pytest-benchmark: `test_bench_kernels.py` and others.
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import _analytic
import torch
from _contenders import (
    COPIES,
    KERNELS,
    SHAPES,
    Call,
    check,
    contenders,
    kernels_at,
    tensors,
)
from _environment import RESULTS, environment, slug, write
from _suite import buffer_sets
from _timing import (
    LEAD_BYTES,
    graph_timer,
    interleaved,
    launch_timer,
    ratios,
    repeats,
    summary,
    wall_timer,
)
from lesa_kernels.config import lookup
from lesa_kernels.examples import Example

TINY = (1, 8, 64)
LAUNCHES = 64  # calls of one `launched` time
LAUNCH_ROUNDS = 5

Seconds = dict[str, list[float]]


def measure(
    name: str, place: str, history: int, sets: list[Example], options: argparse.Namespace
) -> dict[str, Any]:
    """One row: one kernel at one shape, all contenders, checked before they are timed."""
    example, size = sets[0], sets[0].nbytes
    calls = contenders(name, sets, compile=options.compile)
    errors = check(name, example, calls)
    rounds = 1 if options.tiny else repeats(len(sets), size)
    seconds, launched = (_by_the_clock if options.tiny else _on_device)(calls, rounds, options)
    seconds["best copy"] = [min(pair) for pair in zip(*(seconds[c] for c in COPIES), strict=True)]
    return {
        "kernel": name,
        "place": place,
        "shape": list(SHAPES[place]),
        "history": history,
        "dtype": "bfloat16",
        "bytes": size,
        "configuration": _configuration(example, history),
        "buffer_sets": len(sets),
        "calls_per_replay": rounds * len(sets),
        "contenders": {
            key: {
                "microseconds": _scaled(summary(found), 1e6),
                "launched_microseconds": _scaled(summary(launched[key]), 1e6)
                if key in launched
                else None,
                "gigabytes_per_second": size / 1e9 / median(found),
                "share_of_copy": ratios(seconds, "best copy", key),
                "time_over_triton": ratios(seconds, key, "triton"),
                "relative_error": errors.get(key),
            }
            for key, found in seconds.items()
        },
    }


def _on_device(
    calls: dict[str, list[Call]], rounds: int, options: argparse.Namespace
) -> tuple[Seconds, Seconds]:
    """Seconds of every contender on the device, and as Python launches it."""
    lead = torch.empty(LEAD_BYTES, dtype=torch.uint8, device="cuda")
    pool = torch.cuda.graph_pool_handle()
    graphs = {key: graph_timer(found, rounds, pool, lead) for key, found in calls.items()}
    seconds = interleaved(graphs, options.rounds)
    often = -(-LAUNCHES // len(next(iter(calls.values()))))
    launches = {key: launch_timer(found * often, lead) for key, found in calls.items()}
    return seconds, interleaved(launches, LAUNCH_ROUNDS)


def _by_the_clock(
    calls: dict[str, list[Call]], rounds: int, options: argparse.Namespace
) -> tuple[Seconds, Seconds]:
    """The same by the host's clock, for the logic: Triton's interpreter is among the contenders."""
    timers = {key: wall_timer(found[0]) for key, found in calls.items()}
    return interleaved(timers, options.rounds, warmup=0), {}


def run(options: argparse.Namespace, path: Path) -> None:
    """All rows that fit into the time and memory given; the file is whole after each."""
    device = torch.device("cpu")
    if not options.tiny:
        device = torch.device("cuda", torch.cuda.current_device())
    deadline = time.perf_counter() + options.seconds
    content: dict[str, Any] = {"environment": environment(device), "rows": [], "left_out": []}
    for place, history in product(options.places, options.histories):
        reason = "" if options.tiny else _obstacle(place, history, device)
        sets = [] if reason or time.perf_counter() > deadline else _sets(place, history, device)
        for name in (name for name in kernels_at(place) if name in options.kernels):
            if not sets or time.perf_counter() > deadline:
                why = reason or f"--seconds {options.seconds} were over"
                content["left_out"].append([name, place, history, why])
                continue
            try:
                row = measure(name, place, history, [made[name] for made in sets], options)
            except (Exception, SystemExit) as error:  # the next row is another question
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                content["left_out"].append([name, place, history, reason])
            else:
                content["rows"].append(row)
                show(row)
            write(path, content)
        del sets
        if device.type == "cuda":
            torch.cuda.empty_cache()
    write(path, content)
    for left in content["left_out"]:
        print("left out:", *left)


def show(row: dict[str, Any]) -> None:
    print(f"\n{row['kernel']}, {row['place']}, K = {row['history']}, {row['bytes'] / 1e6:.1f} MB")
    for key, found in row["contenders"].items():
        micro, launched = found["microseconds"]["median"], found["launched_microseconds"]
        host = f"{launched['median']:9.1f} us launched" if launched else ""
        rate, share = found["gigabytes_per_second"], found["share_of_copy"]["median"]
        print(f"  {key:14} {micro:9.1f} us {rate:7.0f} GB/s {share:6.1%} of the copy {host}")


def _sets(place: str, history: int, device: torch.device) -> list[dict[str, Example]]:
    if device.type == "cpu":
        return [tensors(TINY, history, device)]
    first = tensors(SHAPES[place], history, device)
    count = buffer_sets(min(example.nbytes for example in first.values()), device)
    return [first, *(tensors(SHAPES[place], history, device) for _ in range(count - 1))]


def _obstacle(place: str, history: int, device: torch.device) -> str:
    """Why this shape cannot be measured, if so: two sets, float64 checks and copies must fit."""
    needed = torch.Size(SHAPES[place]).numel() * 2 * (8 * history + 40)
    free = torch.cuda.mem_get_info(device)[0]
    return f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free" * (needed > free)


def _configuration(example: Example, history: int) -> dict[str, int]:
    arguments = example.arguments
    feature = arguments["feature" if "feature" in arguments else "out"]
    return lookup(example.kernel, feature, 1 if "slot" in arguments else history)._asdict()


def _scaled(found: dict[str, Any], factor: float) -> dict[str, Any]:
    quartiles = [value * factor for value in found["quartiles"]]
    return {**found, "median": found["median"] * factor, "quartiles": quartiles}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--kernels", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--places", nargs="+", default=[*SHAPES], choices=[*SHAPES])
    parser.add_argument("--histories", nargs="+", type=int, default=[3], help="K, 1 to 8")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=150, help="begin no row after these")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument(
        "--tiny", action="store_true", help="small features in Triton's interpreter, for the logic"
    )
    parser.add_argument("--analytic", action="store_true", help="what needs no GPU, also on one")
    options = parser.parse_args()
    if options.tiny:
        run(options, options.out / "kernels_cpu_tiny.json")
        return
    if options.analytic or not torch.cuda.is_available():
        path = options.out / "kernels_analytic.json"
        found = _analytic.analysis()
        _analytic.show(found)
        write(path, found)
        print(f"\nNothing was timed, since {_why()}; bytes and compiled code are in {path}.")
        return
    path = options.out / f"kernels_{slug(torch.cuda.get_device_name())}.json"
    run(options, path)
    print(f"\n{path}")


def _why() -> str:
    return "--analytic was given" if torch.cuda.is_available() else "PyTorch sees no GPU here"


if __name__ == "__main__":
    main()
