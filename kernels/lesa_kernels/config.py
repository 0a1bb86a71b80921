"""Launch configurations: tuned per device and shape class, found without a search.

They lie in `configs/`, one JSON file per device or family of devices, and before that in the folder
that the environment variable LESA_KERNEL_CONFIGS names. The files of the packaged families are
untimed: chosen from registers, residency and bytes in flight of the compiled code.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from math import ceil, log2
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Config", "file_of", "lookup", "multiprocessors", "programs", "source"]

DEFAULT = "default"  # the device of the last file in the search, and of the interpreter
FOLDER = Path(__file__).parent / "configs"
LOG = logging.getLogger(__name__)
REGISTERS = 65_536  # of a multiprocessor, on all CUDA devices from sm_80 on
LANES = 64 if torch.version.hip else 32  # threads of a warp


class Config(NamedTuple):
    """`block` elements per tile, `threads` per program, at most `programs` per multiprocessor."""

    block: int
    threads: int
    programs: int

    @property
    def warps(self) -> int:
        return max(1, self.threads // LANES)

    def registers(self, sums: int, loads: int, itemsize: int, beside: int = 0) -> int:
        """Registers of a thread for its elements' fp32 `sums`, its `loads` in flight, and others.

        Without as many the assembler puts loads off until others have come. The formula is fitted
        to what the kernels compile to: a quarter more for halves of pairs, masks and addresses.
        """
        held = (sums + loads * itemsize / 4) * self.block / (LANES * self.warps)
        most = min(248, REGISTERS // (LANES * self.warps))
        return min(most, max(64, 8 * ceil((8 + 1.25 * held + beside) / 8)))


def lookup(kernel: str, feature: Tensor, history: int) -> Config:
    """The configuration of the nearest shape: this device's, its family's or a safe default."""
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
    return folder / f"{_words(device_name)}.json"


def source(device_name: str) -> str:
    """Where a device's configurations come from: "tuned", "untimed" or "default"."""
    path = next(_files(device_name))
    if path.stem == DEFAULT:
        return DEFAULT
    kernels = json.loads(path.read_text())["kernels"]
    timed = any("milliseconds" in entry for entries in kernels.values() for entry in entries)
    return "tuned" if timed else "untimed"


def _words(device_name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-").lower()


def _files(device_name: str) -> Iterator[Path]:
    """The device's file, those of its family (fewer words of its name), and the default's."""
    words = _words(device_name).split("-")
    names = ["-".join(words[:count]) for count in range(len(words), 0, -1)]
    own = os.environ.get("LESA_KERNEL_CONFIGS", "")
    for name in dict.fromkeys([*names, DEFAULT]):
        for folder in [*([Path(own)] if own else []), FOLDER]:
            if (path := folder / f"{name}.json").exists():
                yield path


@lru_cache(maxsize=1024)
def _nearest(
    kernel: str, device: torch.device, size: int, columns: int, history: int, itemsize: int
) -> Config:
    wanted = (size, columns, history, itemsize)
    entries = _entries(device_name(device))[kernel]
    found = min(entries, key=lambda entry: _distance(entry["shape"], wanted))
    return Config(**found["config"])


def device_name(device: torch.device) -> str:
    """As the driver tells it; `default` for the interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else DEFAULT


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
    """Per kernel the entries of all the device's files, its own first: the first of equals wins."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in _files(name):
        for kernel, entries in json.loads(path.read_text())["kernels"].items():
            found.setdefault(kernel, []).extend(entries)
    if name != DEFAULT and (kind := source(name)) != "tuned":
        LOG.debug("kernel configurations for %s: %s; python -m lesa_kernels.tune times them once",
                  name, kind)  # fmt: skip
    return found
