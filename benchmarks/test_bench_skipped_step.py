"""One skipped step of FLUX.1 at either tap: `python -m pytest benchmarks --benchmark-only`.

One block of each kind, since a skipped step runs none: on a GPU at full width and 1024x1024 pixels,
with a CUDA graph and without; on a CPU 256 wide and 512x512. All is on Taylor's line through the
two full steps, so what a step should return is known in float64.
"""

from __future__ import annotations

import copy
from functools import cache, partial
from typing import Any

import pytest
import torch
from _models import build
from _suite import PLACES, copy_seconds, in_turn, label, relative_error, synchronize
from diffusers import FluxTransformer2DModel
from torch import Tensor

import lesa

STEPS, FULL = 50, (0, 1)
CHECKED = 4
TEXT = 128  # tokens
SMALL = {
    "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2,
    "attention_head_dim": 128, "joint_attention_dim": 256, "guidance_embeds": True,
}  # fmt: skip
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # a tail rounds to bf16 five times
VARIANTS = [
    (place, tap, graph)
    for place in PLACES
    for tap, graph in (("output", "off"), ("hidden", "off"), ("hidden", "auto"))
    if graph == "off" or place[0] == "cuda"
]


class Walk:
    """The loop around one denoiser, a step at a time, over and over."""

    def __init__(self, model: Any, calls: list[dict[str, Any]]) -> None:
        self.model, self.calls, self.next = model, calls, 0

    def step(self) -> Tensor:
        """One call, in the context that a pipeline gives it."""
        with self.model.cache_context("cond", step_index=self.next):
            found = self.model(**self.calls[self.next])[0]
        self.next = (self.next + 1) % len(self.calls)
        return found

    def to(self, index: int) -> Tensor:
        """Run up to and with step `index`."""
        while self.next != index:
            self.step()
        return self.step()

    def to_skipped(self, device: torch.device) -> None:
        """Run the full steps, if they are next."""
        while self.next in FULL:
            self.step()
        synchronize(device)


@cache
def denoiser(kind: str) -> Any:
    """FLUX.1's transformer with random weights."""
    device = torch.device(kind)
    if kind == "cuda":
        return build("flux.1-dev", device, share=0.0)[0].transformer
    torch.manual_seed(0)
    return FluxTransformer2DModel(**SMALL).to(device).eval()


def inputs(model: Any) -> list[dict[str, Any]]:
    """Arguments of every call: another latent and another time each."""
    weight, config = next(model.parameters()), model.config
    side = 64 if weight.device.type == "cuda" else 32
    draw = torch.Generator(weight.device).manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draw, device=weight.device).to(weight.dtype)

    one = torch.ones(1, device=weight.device, dtype=weight.dtype)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([rows * 0, rows, columns], -1).view(-1, 3).to(one)
    common = {
        "encoder_hidden_states": normal(1, TEXT, config.joint_attention_dim),
        "pooled_projections": normal(1, config.pooled_projection_dim),
        "img_ids": places, "txt_ids": places.new_zeros(TEXT, 3), "guidance": 3.5 * one,
        "return_dict": False,
    }  # fmt: skip
    return [
        {
            **common,
            "hidden_states": normal(1, side * side, config.in_channels),
            "timestep": one * (1 - index / STEPS),
        }
        for index in range(STEPS)
    ]


def expected(model: Any, calls: list[dict[str, Any]], tap: str) -> Tensor:
    """What the skipped step CHECKED should return, float64, from plain calls."""
    kept: list[tuple[Tensor, ...]] = []
    handle = model.norm_out.register_forward_pre_hook(lambda _, args: kept.append(args))
    with handle:
        outputs = [model(**calls[index])[0].double() for index in (*FULL, CHECKED)]
    hidden, times = zip(*kept, strict=True)
    newest, before, ahead = FULL[1], FULL[0], CHECKED - FULL[1]
    first, second = outputs[:2] if tap == "output" else (h.double() for h in hidden[:2])
    line = second + (second - first) * ahead / (newest - before)
    if tap == "output":
        return line
    norm, projection = (copy.deepcopy(m).double() for m in (model.norm_out, model.proj_out))
    return projection(norm(line, times[-1].double()))


@torch.no_grad()
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("place", "tap", "graph"),
    VARIANTS,
    indirect=["place"],
    ids=[f"{tap}{'-graph' * (g == 'auto')}-{label(place)}" for place, tap, g in VARIANTS],
)
def test_skipped_step(benchmark: Any, place: Any, tap: Any, graph: Any) -> None:
    """Checked against float64 once warm: after graphs were recorded, where there are any."""
    model, device = denoiser(place.device.type), place.device
    dtype = next(model.parameters()).dtype
    calls = inputs(model)
    exact = expected(model, calls, tap)
    schedule = lesa.Schedule.explicit(FULL, STEPS)
    config = lesa.LesaConfig(
        lesa.Taylor(1), schedule=schedule, tap=tap, graph=graph, num_inference_steps=STEPS
    )
    lesa.apply_lesa_cache(model, config)
    try:
        walk = Walk(model, calls)
        for _ in range(3):  # the model's times are learned, and graphs recorded
            error = relative_error(walk.to(CHECKED), exact)
            assert error <= LIMITS[dtype]
            walk.to(STEPS - 1)
        stats = lesa.stats(model)
        assert not stats.fallbacks
        if graph == "auto" and not stats.graphs.get("captured"):
            pytest.skip(f"no graph is recorded here: {stats.graphs}")
        size = stats.ring_bytes // len(FULL) * (len(FULL) + 1)
        benchmark.extra_info.update(
            device=str(device), backend=place.backend, tap=tap, graph=graph, bytes=size,
            dtype=str(dtype).removeprefix("torch."), relative_error=error,
        )  # fmt: skip
        benchmark.group = f"skipped step on {device}"
        once = in_turn([walk.step], device)
        benchmark.pedantic(once, setup=partial(walk.to_skipped, device), rounds=96, warmup_rounds=9)
        if not benchmark.disabled:
            share = copy_seconds(size, device) / benchmark.stats.stats.median
            benchmark.extra_info["share_of_copy"] = share
    finally:
        lesa.remove_lesa_cache(model)
