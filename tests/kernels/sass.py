"""The machine code of a compiled kernel: registers, accesses, residency, loads in flight."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton

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
    return {
        "registers": int(numbers["REG"]),
        "spilled": int(numbers["STACK"]) + int(numbers["LOCAL"]),
        "shared": kernel.metadata.shared,
        "loads": dict(Counter(bits for kind, bits in access if kind == "LDG")),
        "stores": dict(Counter(bits for kind, bits in access if kind == "STG")),
        "instructions": len(code),
        "resident": _resident(kernel, int(numbers["REG"])),  # programs per multiprocessor
        "in_flight": in_flight(code),  # bytes per thread
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
