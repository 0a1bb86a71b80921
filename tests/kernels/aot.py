"""Compile the kernels as their launchers would on a given GPU, without one; read the machine code.

    python tests/kernels/aot.py [TARGET ...]      # JSON, one object per kernel and target

Triton's own argument binder runs, so the alignment hints are the real ones; only the driver is a
stand-in that names the target, and nothing is launched. Not in a process with TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from lesa_kernels import config
from lesa_kernels.examples import Example, examples
from lesa_kernels.mix import mix
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
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Limits(NamedTuple):
    """Of a multiprocessor: threads, programs, bytes of shared memory."""

    threads: int
    programs: int
    shared: int


LIMITS = {  # CUDA C programming guide, technical specifications per compute capability
    80: Limits(2048, 32, 164 * 1024),
    89: Limits(1536, 24, 100 * 1024),
    90: Limits(2048, 32, 228 * 1024),
    100: Limits(2048, 32, 228 * 1024),
}
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)\s*([^;]*);")
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


def read_cuda(kernel: Any) -> dict[str, Any]:
    """Registers, spilled bytes, global accesses by their bits, and what a multiprocessor holds."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", "-sass", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", sass))
    code = [(name, operands) for name, operands in INSTRUCTION.findall(sass)]
    access = [(name[:3], _bits(name)) for name, _ in code if name[:5] in ("LDG.E", "STG.E")]
    resident = _resident(kernel, int(numbers["REG"]))
    flying = in_flight(code)
    return {
        "registers": int(numbers["REG"]),
        "spilled": int(numbers["STACK"]) + int(numbers["LOCAL"]),
        "shared": kernel.metadata.shared,
        "loads": dict(Counter(bits for kind, bits in access if kind == "LDG")),
        "stores": dict(Counter(bits for kind, bits in access if kind == "STG")),
        "instructions": len(code),
        "resident": resident,  # programs per multiprocessor
        "in_flight": flying,  # bytes per thread
        "kilobytes": flying * resident * 32 * kernel.metadata.num_warps // 1024,
    }


def in_flight(code: list[tuple[str, str]]) -> int:
    """The most bytes of features that a thread has asked for before it waits for any of them.

    Loads of 64 bits and more count, from where they are issued until a register of theirs is named
    again; branches are passed by, so a loop counts once.
    """
    waiting: dict[int, int] = {}  # register -> the first one of its load
    most = 0
    for name, operands in code:
        named = set()
        for first, wide in re.findall(r"\bR(\d+)(\.64)?", operands):
            named |= {int(first), int(first) + bool(wide)}
        used = {waiting[register] for register in named if register in waiting}
        waiting = {register: load for register, load in waiting.items() if load not in used}
        if name.startswith("LDG.E") and _bits(name) >= 64:
            first = int(re.match(r"R(\d+)", operands)[1])  # type: ignore[index]
            waiting |= dict.fromkeys(range(first, first + _bits(name) // 32), first)
            most = max(most, 4 * len(waiting))
    return most


def _bits(name: str) -> int:
    """Of a global access."""
    narrow = re.search(r"\.[US](8|16)\b", name)
    wide = re.search(r"\.(64|128)\b", name)
    return int((narrow or wide)[1]) if narrow or wide else 32  # type: ignore[index]


def _resident(kernel: Any, registers: int) -> int:
    """Programs that a multiprocessor holds at once."""
    limits, warps = LIMITS[kernel.metadata.target.arch], kernel.metadata.num_warps
    by_registers = 65536 // (-(-registers // 8) * 8 * 32) // warps
    by_memory = limits.shared // (kernel.metadata.shared + 1024)
    return min(limits.programs, limits.threads // (32 * warps), by_registers, by_memory)


def read_hip(kernel: Any) -> dict[str, Any]:
    """The same from AMD's assembly."""
    text = kernel.asm["amdgcn"]
    names = {"ubyte": 8, "byte": 8, "ushort": 16, "short": 16, "dword": 32, "dwordx2": 64,
             "dwordx3": 96, "dwordx4": 128}  # fmt: skip
    access = re.findall(
        r"\b(?:global|buffer)_(load|store)_(ubyte|byte|ushort|short|dword(?:x\d)?)", text
    )
    spilled = sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)))
    return {
        "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1]),
        "spilled": spilled,
        "shared": kernel.metadata.shared,
        "loads": dict(Counter(names[bits] for kind, bits in access if kind == "load")),
        "stores": dict(Counter(names[bits] for kind, bits in access if kind == "store")),
        "instructions": len(re.findall(r"^\t[a-z]+_\w+", text, re.M)),
    }


def report(names: list[str]) -> list[dict[str, Any]]:
    """One row per kernel and target."""
    rows = []
    for name in names:
        target = TARGETS[name]
        read = read_cuda if target.backend == "cuda" else read_hip
        device = DEVICES[name]
        for case, run, options in cases(name):
            for kernel, programs in compiled(run, target, device, **options):
                launched = {"programs": programs / device.multiprocessors}
                rows.append({"case": case, "target": name, **launched, **read(kernel)})
    return rows


if __name__ == "__main__":
    print(json.dumps(report(sys.argv[1:] or list(TARGETS)), indent=1))
