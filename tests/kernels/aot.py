"""Compile every kernel as its launcher would on a given GPU, without one, and read the machine code.

    python tests/kernels/aot.py [TARGET ...]      # JSON, one object per kernel and target

Triton's own argument binder runs (so alignment hints are the real ones); only the driver is a stand-in
that names the target, and nothing is launched. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lesa_kernels import config
from lesa_kernels.fp8 import mix_fp8, push_fp8
from lesa_kernels.gate import Gate
from lesa_kernels.gram import gram
from lesa_kernels.mix import mix
from lesa_kernels.mix_backward import mix_grad_features, mix_grad_table
from lesa_kernels.mix_modulate import mix_modulate
from lesa_kernels.spline_mix import spline_mix

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHAPE, STEPS, K, SLOTS = (1, 4096, 3072), 50, 3, 4


class Driver(NamedTuple):
    """What Triton asks of a driver before it launches."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}-{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


def operands(shape: tuple[int, ...] = SHAPE, history: int = K) -> dict[str, torch.Tensor]:
    """Tensors that are never read or written: untouched pages."""
    bf16 = torch.bfloat16
    return {
        "ring": torch.empty(max(history, SLOTS), *shape, dtype=bf16),
        "slots": torch.zeros(history, dtype=torch.int32),
        "table": torch.zeros(STEPS, history),
        "step": torch.zeros(1, dtype=torch.int32),
        "out": torch.empty(shape, dtype=bf16),
    }


def run_spline_mix() -> None:
    x = operands()
    nodes = torch.zeros(3, 256)
    gate = Gate(torch.zeros(3, 51, 256), nodes, nodes, torch.zeros(3, 8, 256), -3.0, 3.0)
    spline_mix(
        x["ring"], x["slots"], x["table"], torch.zeros(STEPS, 51), gate, x["step"], x["out"],
        experts=torch.zeros(STEPS, dtype=torch.int32), bias=torch.zeros(STEPS),
    )  # fmt: skip


def run_modulate(columns: int = 3072, history: int = K) -> None:
    rows = torch.empty(STEPS, 1, 2 * columns, dtype=torch.bfloat16).chunk(2, dim=-1)
    x = operands((1, 4096, columns), history)
    mix_modulate(x["ring"], x["slots"], x["table"], x["step"], *rows, x["out"])


def run_grads(bands: int) -> None:
    x = operands()
    table = torch.zeros(STEPS, K, bands)
    mix_grad_features(x["out"], x["slots"], table, x["step"], x["ring"])
    if bands > 1:
        mix_grad_table(x["out"], x["ring"], x["slots"], bands=bands)


def run_fp8(history: int = K) -> None:
    x = operands(history=history)
    ring, scales = x["ring"].to(torch.float8_e4m3fn), torch.empty(len(x["ring"]), SHAPE[1])
    push_fp8(x["out"], ring, scales, x["step"])
    mix_fp8(ring, scales, x["slots"], x["table"], x["step"], x["out"])


CASES: dict[str, Callable[[], Any]] = {
    "mix": lambda: mix(**operands()),
    "mix, K=8": lambda: mix(**operands(history=8)),
    "mix, C=64, latent": lambda: mix(
        **{**operands((1, 4096, 64)), "table": torch.zeros(STEPS, K + 1)},
        latent=torch.empty(1, 4096, 64, dtype=torch.bfloat16), bias=torch.zeros(STEPS),
    ),
    "mix, per channel": lambda: mix(**{**operands(), "table": torch.zeros(STEPS, K, 3072)}),
    "spline_mix": run_spline_mix,
    "mix_modulate": run_modulate,
    "mix_modulate, K=8": lambda: run_modulate(history=8),
    "mix_modulate, C=5120": lambda: run_modulate(5120),
    "gram": lambda: gram(
        operands()["out"], operands()["ring"], operands()["slots"],
        torch.empty(1, K + 3, dtype=torch.float64), base=operands()["out"],
    ),
    "backward": lambda: run_grads(1),
    "backward, per channel": lambda: run_grads(3072),
    "fp8": run_fp8,
    "control: odd width": lambda: mix(**operands((1, 4095, 3071))),
    "control: 16 registers": lambda: mix(**operands()),
}  # fmt: skip


def compiled(run: Callable[[], Any], target: GPUTarget, **options: Any) -> list[tuple[str, Any]]:
    """(kernel's name, compiled kernel) of all that `run` would launch."""
    found = []
    original = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs, **options)
        found.append((self.fn.__name__.strip("_"), kernel))

    config.LANES = target.warp_size
    driver.set_active(Driver(target))
    JITFunction.run = warm_up
    try:
        run()
    finally:
        JITFunction.run = original
    return found


def read_cuda(kernel: Any) -> dict[str, Any]:
    """Registers, spilled bytes and the widths in bits of global accesses, from SASS."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    numbers = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    access = re.findall(r"\b(LDG|STG)\.E\S*?(?:\.(U8|S8|U16|S16|64|128))?(?:\.\w+)* ", sass)
    width = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "": 32}
    return {
        "registers": int(numbers["REG"]),
        "spilled": int(numbers["STACK"]) + int(numbers["LOCAL"]),
        "shared": int(numbers["SHARED"]),
        "loads": dict(Counter(width[bits] for kind, bits in access if kind == "LDG")),
        "stores": dict(Counter(width[bits] for kind, bits in access if kind == "STG")),
        "instructions": len(re.findall(r"/\*[0-9a-f]{4}\*/", sass)),
    }


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
        for case, run in CASES.items():
            if case.startswith("control") and name != "sm_90":
                continue
            options = {"maxnreg": 16} if "16 registers" in case else {}
            for function, kernel in compiled(run, target, **options):
                facts = read_cuda(kernel) if target.backend == "cuda" else read_hip(kernel)
                rows.append({"case": case, "kernel": function, "target": name, **facts})
    return rows


if __name__ == "__main__":
    print(json.dumps(report(sys.argv[1:] or list(TARGETS)), indent=1))
