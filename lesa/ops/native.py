"""The compiled kernels of csrc/: found and loaded on first use, or a reason why not.

    if native.load("cpu"):
        native.mix(ring, slots, table, step, out)  # or torch.ops.lesa_native.mix_out(...)

They are optional: a plain install has none. In a checkout `python setup.py build_ext --inplace`
builds them, and so does `LESA_BUILD_EXT=1 pip install --no-build-isolation -e .`. `LESA_NATIVE_DIR`
names another folder to look in.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lesa_kernels.gate import Gate

__all__ = [
    "gram",
    "isa",
    "library",
    "load",
    "mix",
    "mix_modulate",
    "spline_mix",
    "status",
    "takes",
    "why_not",
]

OPERATORS = ("mix_out", "mix_modulate_out", "gram_out", "spline_mix_out")
REMEDY = "build it: LESA_BUILD_EXT=1 pip install --no-build-isolation -e ."
WIDTHS = {16: "baseline", 32: "AVX2", 64: "AVX-512"}


def library(device: str = "cpu") -> Path:
    """Where the library for a device type, "cpu" or "cuda", is looked for."""
    folder = os.environ.get("LESA_NATIVE_DIR") or Path(__file__).parents[1]
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


def takes(name: str, feature: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether there is a compiled kernel `name` for a feature and these optional arguments.

    The CUDA kernels get latent coefficient and bias from the host, which would have to wait.
    """
    if feature.device.type == "cpu":
        names = ("mix", "mix_modulate", "gram", "spline_mix")
        return name in names and "band_size" not in options
    return (
        name in ("mix", "mix_modulate")
        and feature.dtype != torch.float64
        and all(value is None for value in options.values())
    )


def mix(
    ring: Tensor,
    slots: Tensor,
    table: Tensor,
    step: Tensor,
    out: Tensor,
    *,
    latent: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """See `lesa_kernels.mix.mix`; without bands."""
    row, history = _row(table, step), len(slots)
    own = 0.0 if latent is None else float(row[history])
    shift = 0.0 if bias is None else float(bias[int(step)])
    torch.ops.lesa_native.mix_out(ring, slots, row[:history], latent, own, shift, out)
    return out


def mix_modulate(
    ring: Tensor,
    slots: Tensor,
    table: Tensor,
    step: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    feature: Tensor | None = None,
) -> Tensor:
    """See `lesa_kernels.mix_modulate.mix_modulate`."""
    row, added = _row(table, step), 0.0 if bias is None else float(bias[int(step)])
    if scale.ndim == 3:
        scale, shift = _row(scale, step), _row(shift, step)
    torch.ops.lesa_native.mix_modulate_out(ring, slots, row, added, scale, shift, eps, out, feature)
    return out


def spline_mix(
    ring: Tensor,
    slots: Tensor,
    weights: Tensor,
    tau: Tensor,
    gate: Gate,
    step: Tensor,
    out: Tensor,
    *,
    experts: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """See `lesa_kernels.spline_mix.spline_mix`; on the CPU."""
    at = int(step)
    expert = 0 if experts is None else int(experts[at])
    parts = [part[expert] for part in gate[:4]]
    added = 0.0 if bias is None else float(bias[at])
    torch.ops.lesa_native.spline_mix_out(
        ring, slots, weights[at], tau[at], *parts, gate.low, gate.high, added, out
    )
    return out


def gram(
    feature: Tensor, ring: Tensor, slots: Tensor, out: Tensor, *, base: Tensor | None = None
) -> Tensor:
    """See `lesa_kernels.experimental.gram.gram`."""
    torch.ops.lesa_native.gram_out(feature, ring, slots, base, out)
    return out


def _row(values: Tensor, step: Tensor) -> Tensor:
    """The row of a step; on a device, where the host must not wait for its number, a copy."""
    if values.device.type == "cpu":
        return values[int(step)]
    return values.index_select(0, step.view(1))[0]


def _writes_only(*_: object) -> None:
    """The operators return nothing and make no tensor."""
