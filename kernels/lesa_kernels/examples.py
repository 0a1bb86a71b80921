"""One typical call of every kernel: for `tune`, for benchmarks and for the compile tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lesa_kernels.config import Config
from lesa_kernels.experimental.fp8 import FP8, mix_fp8, push_fp8
from lesa_kernels.experimental.gram import gram
from lesa_kernels.experimental.mix_backward import mix_grad_features, mix_grad_table
from lesa_kernels.gate import Gate, fold_times
from lesa_kernels.mix import mix
from lesa_kernels.mix_modulate import mix_modulate
from lesa_kernels.spline_mix import spline_mix

__all__ = ["Example", "examples"]

STEPS, NODES, INTERVALS = 50, 256, 5


@dataclass(frozen=True)
class Example:
    """A launcher with its arguments.

    `kernel` is its key in the configurations, `result` what it writes, `nbytes` what it must read
    and write at least, by its tensors' sizes: an analytic figure, not a measured one.
    """

    kernel: str
    launch: Callable[..., Any]
    arguments: dict[str, Any]
    result: Tensor
    nbytes: int

    def run(self, config: Config | None = None) -> Any:
        return self.launch(**self.arguments, config=config)


def examples(
    shape: tuple[int, ...] = (1, 4096, 3072),
    history: int = 3,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    fill: Callable[..., Tensor] = torch.randn,
) -> dict[str, Example]:
    """All kernels at one shape [B, ..., C]; with fill=torch.empty features stay unwritten."""

    def feature(*lead: int) -> Tensor:
        return fill((*lead, *shape), dtype=dtype, device=device)

    def numbers(*size: int) -> Tensor:
        return torch.rand(size, device=device) - 0.5

    ring, out, extra = feature(history + 1), feature(), feature()
    slots = torch.arange(history, dtype=torch.int32, device=device)
    step = torch.ones(1, dtype=torch.int32, device=device)
    table, channels = numbers(STEPS, history), shape[-1]
    common = {"ring": ring, "slots": slots, "table": table, "step": step, "out": out}
    banded = {**common, "table": numbers(STEPS, history, channels)}
    backward = {"grad": out, "slots": slots, "table": table, "step": step, "ring_grad": ring}
    scale, shift = numbers(STEPS, shape[0], 2 * channels).to(dtype).chunk(2, dim=-1)
    products = torch.empty(1, history + 3, dtype=torch.float64, device=device)
    codes = torch.zeros(ring.shape, dtype=FP8, device=device)
    tokens = out.numel() // channels
    scales = numbers(history + 1, tokens).abs()
    one, byte, scaled = out.nbytes, out.numel(), 4 * tokens
    return {
        "mix": Example("mix", mix, common, out, (history + 1) * one),
        "mix per channel": Example("mix_banded", mix, banded, out, (history + 1) * one),
        "spline_mix": Example(
            "spline_mix", spline_mix, _gated(common, numbers), out, (history + 1) * one
        ),
        "mix_modulate": Example(
            "mix_modulate", mix_modulate, {**common, "scale": scale, "shift": shift}, out,
            (history + 1) * one,
        ),
        "gram": Example(
            "gram", gram,
            {"feature": extra, "ring": ring, "slots": slots, "out": products, "base": out},
            products, (history + 2) * one,
        ),
        "mix_grad_features": Example(
            "mix_backward", mix_grad_features, backward, ring, (history + 1) * one
        ),
        "mix_grad_table per channel": Example(
            "mix_backward", mix_grad_table,
            {"grad": out, "ring": ring, "slots": slots, "bands": channels},
            out, (history + 1) * one,
        ),
        "push_fp8": Example(
            "push_fp8", push_fp8,
            {"feature": extra, "ring": codes, "scales": scales, "slot": slots[:1]},
            codes, one + byte + scaled,
        ),
        "mix_fp8": Example(
            "mix_fp8", mix_fp8, {**common, "ring": codes, "scales": scales}, out,
            history * (byte + scaled) + one,
        ),
    }  # fmt: skip


def _gated(common: dict[str, Tensor], numbers: Callable[..., Tensor]) -> dict[str, Any]:
    """Arguments of `spline_mix` at the paper's size: 51 times (folded), 256 nodes, 3 stages."""
    gate = Gate(
        numbers(3, STEPS + 1, NODES),
        numbers(3, NODES),
        numbers(3, NODES),
        numbers(3, INTERVALS + 3, NODES),
        -3.0,
        3.0,
    )
    device = common["step"].device
    times = torch.linspace(1, 0, STEPS + 1, device=device)
    stages = torch.arange(STEPS, device=device) * 3 // STEPS
    arguments = {**common, "weights": common["table"], "tau": times[:-1, None].contiguous()}
    del arguments["table"]
    gate = fold_times(gate, times)
    return {**arguments, "gate": gate, "experts": stages.int(), "bias": numbers(STEPS)}
