"""One typical call of every operator, without Triton: features in bf16, batch 1, K = 3."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from lesa_kernels.gate import Gate, fold_times
from lesa_testbed import reference
from torch import Tensor

from lesa.ops import native

HISTORY, STEPS, STEP = 3, 50, 7
NODES, INTERVALS, STAGES = 256, 5, 3  # the paper's gate
SHAPES = {  # of FLUX.1's features; the hidden one is that of 512x512 pixels on a CPU
    "output": {"cuda": (1, 4096, 64), "cpu": (1, 4096, 64)},
    "hidden": {"cuda": (1, 4096, 3072), "cpu": (1, 1024, 3072)},
}
BIG = ("ring", "out", "feature", "base", "latent")  # rotate; all else is small

Arguments = dict[str, Any]


class Case(NamedTuple):
    """An operator of `lesa.ops` at one of the two taps."""

    operator: str
    tap: str
    latent: bool = False

    def __str__(self) -> str:
        return f"{self.operator}{'-latent' * self.latent}-{self.tap}"

    def has(self, device: str, backend: str) -> bool:
        """Whether the backend has a kernel of its own for it, where the backend itself is there."""
        if backend != "native":
            return True
        options = {"latent": True} if self.latent else {}
        like = torch.empty(0, dtype=torch.bfloat16, device=device)
        return native.takes(self.operator, like, options)


CASES = (
    Case("mix", "output", latent=True),
    Case("mix", "hidden"),
    Case("mix_modulate", "hidden"),
    Case("spline_mix", "output"),
    Case("spline_mix", "hidden"),
    Case("gram", "output"),
    Case("gram", "hidden"),
)


def arguments(case: Case, device: torch.device) -> Arguments:
    """Arguments of the launcher; what it has to write is NaN."""
    shape, draw = SHAPES[case.tap][device.type], torch.Generator(device).manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(size, generator=draw, device=device).to(dtype)

    def row(*size: int) -> Tensor:
        return normal(*size, dtype=torch.float32)

    common: Arguments = {
        "ring": normal(HISTORY, *shape),
        "slots": torch.arange(HISTORY, dtype=torch.int32, device=device).roll(1),
        "step": torch.full((1,), STEP, dtype=torch.int32, device=device),
        "out": torch.full(shape, torch.nan, dtype=torch.bfloat16, device=device),
    }
    if case.operator == "gram":
        products = torch.full((1, HISTORY + 3), torch.nan, dtype=torch.float64, device=device)
        del common["step"]
        return {**common, "feature": normal(*shape), "base": normal(*shape), "out": products}
    if case.operator == "spline_mix":
        times = torch.linspace(1, 0, STEPS + 1, device=device)
        parts = (STAGES, STEPS + 1, NODES), (STAGES, NODES), (STAGES, NODES)
        gate = Gate(*(row(*p) / NODES for p in parts), row(STAGES, INTERVALS + 3, NODES), -3.0, 3.0)
        experts = (torch.arange(STEPS, device=device) * STAGES // STEPS).int()
        return {
            **common, "weights": row(STEPS, HISTORY), "gate": fold_times(gate, times),
            "tau": times[:-1, None].contiguous(), "experts": experts, "bias": row(STEPS),
        }  # fmt: skip
    common["table"] = row(STEPS, HISTORY + case.latent)
    if case.operator == "mix_modulate":
        both = normal(STEPS, shape[0], 2 * shape[-1])
        common["scale"], common["shift"] = both.chunk(2, dim=-1)
    if case.latent:
        common["latent"] = normal(*shape)
    return common


def another(made: Arguments) -> Arguments:
    """The same arguments with features in other memory."""
    return {key: value.clone() if key in BIG else value for key, value in made.items()}


def nbytes(made: Arguments) -> int:
    """What must move at least: every feature once; an analytic figure, not a measured one."""
    return sum(made[key].nbytes for key in BIG if key in made)


def expected(case: Case, made: Arguments) -> Tensor:
    """What the operator should write, computed and left in float64."""
    wide = {**made, "out": torch.empty_like(made["out"], dtype=torch.float64)}
    return getattr(reference, case.operator)(**wide)
