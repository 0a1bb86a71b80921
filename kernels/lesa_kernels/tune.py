"""Find the fastest launch configurations of the kernels on this GPU: `python -m lesa_kernels.tune`.

Needs a GPU with nothing else on it; minutes for everything, or what fits into --seconds. The JSON
file of the device, in the package's `configs` folder or in --folder (where LESA_KERNEL_CONFIGS must
then point), is rewritten after every entry, so that an interrupted run keeps what it found.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

from lesa.errors import LesaError
from lesa_kernels.config import FOLDER, Config, file_of
from lesa_kernels.examples import Example, examples

__all__ = ["KERNELS", "main", "search", "tune"]

SHAPES = ((1, 4096, 3072), (1, 4096, 64), (2, 4096, 3072), (1, 8192, 5120))
HISTORIES = (3, 8)
KERNELS = ("mix", "mix_banded", "spline_mix", "mix_modulate", "gram", "mix_backward", "push_fp8",
           "mix_fp8")  # fmt: skip
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


def tune(
    folder: Path,
    device: torch.device,
    device_name: str,
    timer: Timer,
    shapes: Iterable[tuple[int, ...]] = SHAPES,
    candidates: Sequence[Config] = CANDIDATES,
    *,
    kernels: Sequence[str] = KERNELS,
    seconds: float = math.inf,
) -> Path:
    """Search the kernels at every shape and history, and keep each finding in the device's file.

    Entries that the file has for other kernels and shapes stay. After `seconds` no search begins.
    """
    deadline, path = time.monotonic() + seconds, file_of(device_name, folder)
    left = []
    for key, example in _cases(shapes, kernels, device):
        label = f"{example.kernel} {'x'.join(map(str, example.result.shape))} K={key['history']}"
        if time.monotonic() > deadline:
            left.append(label)
            continue
        config, milliseconds = search(example, timer, candidates, deadline=deadline)
        entry = {
            "shape": key,
            "config": config._asdict(),
            "milliseconds": round(milliseconds, 6),
            "gb_per_s": round(example.nbytes / milliseconds / 1e6, 1),
            "share_of_copy": round(_copy(example.nbytes, device, timer) / milliseconds, 4),
        }
        print(f"{label}: {config} {entry['gb_per_s']} GB/s, {entry['share_of_copy']} of a copy")
        _keep(path, device_name, example.kernel, entry)
    if left:
        print(f"no time was left for {', '.join(left)}", file=sys.stderr)
    return path


def _cases(
    shapes: Iterable[tuple[int, ...]], kernels: Sequence[str], device: torch.device
) -> Iterator[tuple[dict[str, int], Example]]:
    """Shape class and call of all that is searched; the shortest history first."""
    shapes = list(shapes)
    for history in HISTORIES:
        for shape in shapes:
            key = {"size": math.prod(shape), "columns": shape[-1], "history": history}
            for example in examples(shape, history, device=device).values():
                # grad_table shares its configuration with grad_features
                if example.kernel in kernels and "grad_table" not in example.launch.__name__:
                    yield key | {"itemsize": 2}, example


def _copy(nbytes: int, device: torch.device, timer: Timer) -> float:
    """How long a copy takes that reads and writes together `nbytes`."""
    source, target = torch.empty(2, max(1, nbytes // 2), dtype=torch.uint8, device=device)
    return timer(lambda: target.copy_(source))


def _keep(path: Path, device_name: str, kernel: str, entry: dict[str, Any]) -> None:
    """Add an entry to the file, which is replaced as a whole."""
    found = json.loads(path.read_text()) if path.exists() else {}
    kernels = found.get("kernels", {})
    others = [old for old in kernels.get(kernel, []) if old["shape"] != entry["shape"]]
    kernels[kernel] = [*others, entry]
    found = {"device": device_name, "torch": torch.__version__, "triton": triton.__version__,
             "date": date.today().isoformat(), "kernels": kernels}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(path)


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


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(size) if size.isdecimal() else 0 for size in text.split("x"))
    if len(shape) < 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: write BxTxC, such as 1x4096x3072")
    return shape


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give seconds above 0")
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lesa_kernels.tune", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write the JSON file")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, metavar="KERNEL",
                        help=f"which to search: {', '.join(KERNELS)}; all by default")  # fmt: skip
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, metavar="BxTxC",
                        help="features' shapes, such as 1x4096x3072")  # fmt: skip
    parser.add_argument("--seconds", type=_seconds, default=math.inf,
                        help="begin no search after this time; no limit by default")  # fmt: skip
    parser.add_argument("--dry", action="store_true",
                        help="by the host's clock in Triton's interpreter (TRITON_INTERPRET=1), "
                             "to try the command out")  # fmt: skip
    chosen = parser.parse_args(arguments)
    if chosen.dry:
        device, name, timer = torch.device("cpu"), "interpreter", by_the_clock
    elif torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        name, timer = torch.cuda.get_device_name(device), replayed
    else:
        print("lesa_kernels.tune times kernels on a GPU, and PyTorch sees none here.",
              file=sys.stderr)  # fmt: skip
        raise SystemExit(2)
    print(tune(chosen.folder, device, name, timer, chosen.shapes, kernels=chosen.kernels,
               seconds=chosen.seconds))  # fmt: skip


if __name__ == "__main__":
    main()
