"""The compiled kernels of csrc/: found and loaded on first use, or a reason why not.

    if native.load("cpu"):
        torch.ops.lesa_native.mix_out(ring, slots, coefficients, None, 0.0, 0.0, out)

They are optional: a plain install has none. In a checkout `python setup.py build_ext --inplace`
builds them, and so does `LESA_BUILD_EXT=1 pip install --no-build-isolation -e .`. `LESA_NATIVE_DIR`
names another folder to look in.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import torch

__all__ = ["isa", "library", "load", "status", "why_not"]

OPERATORS = ("mix_out", "mix_modulate_out", "gram_out")
REMEDY = "build it: LESA_BUILD_EXT=1 pip install --no-build-isolation -e ."
WIDTHS = {16: "baseline", 32: "AVX2", 64: "AVX-512"}


def library(device: str = "cpu") -> Path:
    """Where the library for a device type, "cpu" or "cuda", is looked for."""
    folder = os.environ.get("LESA_NATIVE_DIR") or Path(__file__).parent
    return Path(folder) / f"_native_{device}.so"


def load(device: str = "cpu") -> bool:
    """Whether `torch.ops.lesa_native` works on the device type; loads its library once."""
    return not why_not(device)


@functools.cache
def why_not(device: str = "cpu") -> str:
    """Why the library for a device type cannot be used, in one sentence; empty where it can."""
    path = library(device)
    if not path.is_file():
        return f"{path} does not exist; {REMEDY}"
    if device != "cpu":
        if reason := why_not("cpu"):  # it defines the operators
            return reason
        if not torch.cuda.is_available():
            return "torch finds no CUDA device; the CUDA kernels are left alone."
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load beside torch {torch.__version__} ({error}); {REMEDY}"
    if device == "cpu":
        for name in OPERATORS:
            torch.library.register_fake(f"lesa_native::{name}", _writes_only)
    return ""


def isa() -> str:
    """The instruction set that the CPU kernels use here, such as "AVX2"; empty where not loaded."""
    if not load("cpu"):
        return ""
    width = torch.ops.lesa_native.vector_bytes()
    return WIDTHS[width] if platform.machine() in ("x86_64", "AMD64") else f"{8 * width} bits"


def status() -> dict[str, str]:
    """One sentence for each device type, for `lesa env`."""
    if reason := why_not("cpu"):
        return {"cpu": reason, "cuda": why_not("cuda")}
    loaded = f"loaded from {library('cpu')}, {isa()}"
    return {"cpu": loaded, "cuda": why_not("cuda") or f"loaded from {library('cuda')}"}


def _writes_only(*_: object) -> None:
    """The operators return nothing and make no tensor."""
