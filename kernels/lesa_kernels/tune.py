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
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton

from lesa_kernels.config import FOLDER, Config, file_of
from lesa_kernels.examples import Example, examples
from lesa_kernels.search import CANDIDATES, Timer, by_the_clock, replayed, search

__all__ = ["KERNELS", "main", "tune"]

SHAPES = ((1, 4096, 3072), (1, 4096, 64), (2, 4096, 3072), (1, 8192, 5120))
HISTORIES = (3, 8)
KERNELS = ("mix", "mix_banded", "spline_mix", "mix_modulate", "gram", "mix_backward", "push_fp8",
           "mix_fp8")  # fmt: skip


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
    for shape, history, example in _cases(shapes, kernels, device):
        label = f"{example.kernel} {'x'.join(map(str, shape))} K={history}"
        if time.monotonic() > deadline:
            left.append(label)
            continue
        config, milliseconds = search(example, timer, candidates, deadline=deadline)
        key = {"size": math.prod(shape), "columns": shape[-1], "history": history, "itemsize": 2}
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
) -> Iterator[tuple[tuple[int, ...], int, Example]]:
    """Shape, history and call of all that is searched; the shortest history first."""
    shapes = list(shapes)
    for history in HISTORIES:
        for shape in shapes:
            for example in examples(shape, history, device=device).values():
                # grad_table shares its configuration with grad_features
                if example.kernel in kernels and "grad_table" not in example.launch.__name__:
                    yield shape, history, example


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
