"""Launch configurations: tuned per device and shape class, found without a search.

They lie in `configs/`, one JSON file per device, and before that in the folder that the environment
variable LESA_KERNEL_CONFIGS names.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from functools import lru_cache
from math import ceil, log2
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Config", "file_of", "lookup", "multiprocessors", "programs"]

FOLDER = Path(__file__).parent / "configs"
LANES = 64 if torch.version.hip else 32  # threads of a warp


class Config(NamedTuple):
    """`block` elements per tile, `threads` per program, at most `programs` per multiprocessor."""

    block: int
    threads: int
    programs: int

    @property
    def warps(self) -> int:
        return max(1, self.threads // LANES)

    def registers(self, sums: int, loads: int, itemsize: int) -> int:
        """Registers of a thread that has its share of `sums` in fp32 and `loads` in flight."""
        held = (sums + loads * itemsize / 4) * self.block / (LANES * self.warps)
        return min(248, max(64, 8 * ceil((32 + held) / 8)))  # 32 for addresses and masks


def lookup(kernel: str, feature: Tensor, history: int) -> Config:
    """The configuration tuned for the nearest shape on this device, or a safe default."""
    columns = feature.shape[-1] if feature.ndim else 1
    size = feature.numel()
    return _nearest(kernel, feature.device, size, columns, history, feature.element_size())


def programs(device: torch.device, config: Config, most: int) -> int:
    """Size of a persistent grid for `most` tiles, so that all programs get equally many."""
    rounds = -(-most // (multiprocessors(device) * config.programs))
    return -(-most // max(1, rounds))


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter, where each program costs time."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def file_of(device_name: str, folder: Path = FOLDER) -> Path:
    """Where a device's tuned configurations lie."""
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', device_name).strip('-').lower()}.json"


@lru_cache(maxsize=1024)
def _nearest(
    kernel: str, device: torch.device, size: int, columns: int, history: int, itemsize: int
) -> Config:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "default"
    wanted = (size, columns, history, itemsize)
    entries = _entries(name).get(kernel) or _entries("default")[kernel]
    found = min(entries, key=lambda entry: _distance(entry["shape"], wanted))
    return Config(**found["config"])


def _distance(shape: dict[str, int], wanted: tuple[int, int, int, int]) -> float:
    size, columns, history, itemsize = wanted
    return (
        abs(log2(max(size, 1) / shape["size"]))
        + 4 * abs(log2(max(columns, 1) / shape["columns"]))
        + abs(history - shape["history"])
        + 2 * abs(log2(itemsize / shape["itemsize"]))
    )


@lru_cache(maxsize=16)
def _entries(name: str) -> dict[str, list[dict[str, Any]]]:
    folders = [Path(path) for path in [os.environ.get("LESA_KERNEL_CONFIGS", "")] if path]
    for path in (file_of(name, folder) for folder in [*folders, FOLDER]):
        if path.exists():
            return json.loads(path.read_text())["kernels"]
    warnings.warn(
        f"no tuned kernel configurations for {name!r}, the defaults are used: "
        "run `python -m lesa_kernels.tune` once",
        RuntimeWarning,
        stacklevel=2,
    )
    return {}
