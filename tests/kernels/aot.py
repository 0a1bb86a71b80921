"""Compile the kernels as their launchers would on a given GPU, without one; read the machine code.

    python tests/kernels/aot.py [TARGET ...]      # JSON, one object per kernel and target

Triton's own argument binder runs, so the alignment hints are the real ones; only the driver is a
stand-in that names the target, and nothing is launched. Not in a process with TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from lesa_kernels import config
from lesa_kernels.examples import Example, examples
from lesa_kernels.mix import mix
from sass import read_cuda, read_hip
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Device(NamedTuple):
    """A GPU as `lesa_kernels.config` sees it."""

    name: str
    multiprocessors: int


DEVICES = {  # whose configurations a target is compiled with
    "sm_80": Device("NVIDIA A100-SXM4-80GB", 108),
    "sm_89": Device("NVIDIA GeForce RTX 4090", 128),
    "sm_90": Device("NVIDIA H100 80GB HBM3", 132),
    "sm_100": Device("NVIDIA B200", 148),
    "gfx942": Device("AMD Instinct MI300X", 304),
}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MANY = ("mix", "spline_mix", "mix_modulate", "gram")  # also compiled with eight features


class Driver(NamedTuple):
    """What Triton asks of a driver before it launches."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}-{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


def empty(*shape: int, history: int = 3) -> dict[str, Example]:
    """All kernels on features that nothing reads or writes."""
    return examples(shape, history, fill=torch.empty)


def cases(target: str) -> Iterator[tuple[str, Callable[[], Any], dict[str, int]]]:
    """What to compile: its name, a launch, and options that override the launcher's."""
    usual = empty(1, 4096, 3072)
    for name, example in usual.items():
        yield name, example.run, {}
    small = empty(1, 4096, 64)["mix"].arguments
    table, latent = torch.zeros(50, 4), torch.empty_like(small["out"])
    yield "mix, latent", lambda: mix(**{**small, "table": table}, latent=latent), {}
    if target != "gfx942":
        eight = empty(1, 4096, 3072, history=8)
        for name in MANY:
            yield f"{name}, K=8", eight[name].run, {}
        yield "mix_modulate, C=5120", empty(1, 4096, 5120)["mix_modulate"].run, {}
    if target == "sm_90":
        yield "control: odd width", empty(1, 4095, 3071)["mix"].run, {}
        yield "control: few registers", usual["mix"].run, {"maxnreg": 24}
        crowd = partial(usual["mix"].run, config.Config(2048, 128, 24))
        yield "control: many programs", crowd, {}


def compiled(
    run: Callable[[], Any], target: GPUTarget, device: Device, **options: Any
) -> list[tuple[Any, int]]:
    """All compiled kernels that `run` would launch, and of how many programs."""
    found = []
    original = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = original(self, *args, grid=grid, warmup=True, **{**kwargs, **options})
        found.append((kernel, prod(grid)))

    config.LANES = target.warp_size
    config.device_name = lambda _: device.name
    config.multiprocessors = lambda _: device.multiprocessors
    config._nearest.cache_clear()
    driver.set_active(Driver(target))
    JITFunction.run = warm_up
    try:
        run()
    finally:
        JITFunction.run = original
    return found


def report(names: list[str]) -> list[dict[str, Any]]:
    """One row per kernel and target."""
    rows = []
    for name in names:
        target = TARGETS[name]
        read = read_cuda if target.backend == "cuda" else read_hip
        device = DEVICES[name]
        for case, run, options in cases(name):
            for kernel, programs in compiled(run, target, device, **options):
                row = {"case": case, "target": name, **read(kernel)}
                row["programs"] = programs / device.multiprocessors
                if target.backend == "cuda":
                    working = min(row["programs"], row["resident"])
                    threads = target.warp_size * kernel.metadata.num_warps
                    row["kilobytes"] = round(row["in_flight"] * threads * working / 1024)
                rows.append(row)
    return rows


if __name__ == "__main__":
    print(json.dumps(report(sys.argv[1:] or list(TARGETS)), indent=1))
