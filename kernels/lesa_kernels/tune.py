"""Find the fastest launch configurations of all kernels on this GPU: `python -m lesa_kernels.tune`.

Needs a GPU and a few minutes with nothing else on it. Writes one JSON file per device into the
package's `configs` folder, or into --folder, where LESA_KERNEL_CONFIGS must then point.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from lesa.errors import LesaError
from lesa_kernels.config import FOLDER, Config, file_of
from lesa_kernels.examples import Example, examples

__all__ = ["main", "search", "tune"]

SHAPES = ((1, 4096, 3072), (1, 4096, 64), (2, 4096, 3072), (1, 8192, 5120))
HISTORIES = (3, 8)
CANDIDATES = tuple(
    Config(block, threads, programs)
    for block in (1024, 2048, 4096)
    for threads in (128, 256)
    for programs in (2, 4, 8, 16)
)
ROUNDS = 5
Timer = Callable[[Callable[[], Any]], float]


def search(
    example: Example, timer: Timer, candidates: Sequence[Config] = CANDIDATES, rounds: int = ROUNDS
) -> tuple[Config, float]:
    """The candidate with the smallest median time, and that time in the timer's unit.

    The candidates take turns, in a new order every round. Raises LesaError where one of them gives
    another result than the default configuration.
    """
    example.run()
    expected = example.result.clone()
    for config in candidates:
        example.result.zero_()
        example.run(config)
        if not torch.allclose(example.result.double(), expected.double(), rtol=0.02, atol=0.02):
            raise LesaError(f"{example.kernel} is wrong with {config}; report this as a bug")
    times: dict[Config, list[float]] = {config: [] for config in candidates}
    for _ in range(rounds):
        for config in random.sample(candidates, len(candidates)):
            times[config].append(timer(partial(example.run, config)))
    medians = {config: statistics.median(found) for config, found in times.items()}
    best = min(medians, key=medians.__getitem__)
    return best, medians[best]


def tune(
    folder: Path, device: torch.device, device_name: str, timer: Timer,
    shapes: Iterable[tuple[int, ...]] = SHAPES, candidates: Sequence[Config] = CANDIDATES,
) -> Path:  # fmt: skip
    """Search every kernel at every shape and write the device's file."""
    kernels: dict[str, list[dict[str, Any]]] = {}
    for shape in shapes:
        for history in HISTORIES:
            for example in examples(shape, history, device=device).values():
                if "grad_table" in example.launch.__name__:
                    continue  # shares its configuration with grad_features
                config, milliseconds = search(example, timer, candidates)
                key = {"size": torch.Size(shape).numel(), "columns": shape[-1]}
                key |= {"history": history, "itemsize": 2}
                rate = example.nbytes / milliseconds / 1e6
                print(f"{example.kernel:13} {shape} K={history}: {config} {rate:.0f} GB/s")
                entry = {"shape": key, "config": config._asdict(), "milliseconds": milliseconds}
                kernels.setdefault(example.kernel, []).append(entry)
    path = file_of(device_name, folder)
    found = {"device": device_name, "torch": torch.__version__, "triton": triton.__version__,
             "date": date.today().isoformat(), "kernels": kernels}  # fmt: skip
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(path)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lesa_kernels.tune", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write the JSON file")
    folder = parser.parse_args(arguments).folder
    if not torch.cuda.is_available():
        raise SystemExit("lesa_kernels.tune times kernels on a GPU, and PyTorch sees none here.")
    device = torch.device("cuda", torch.cuda.current_device())

    def timer(run: Callable[[], Any]) -> float:  # clears the L2 cache before each run
        return triton.testing.do_bench(run, warmup=2, rep=20, return_mode="median")

    folder.mkdir(parents=True, exist_ok=True)
    print(tune(folder, device, torch.cuda.get_device_name(device), timer))


if __name__ == "__main__":
    main()
