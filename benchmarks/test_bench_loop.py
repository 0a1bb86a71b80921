"""The denoising loop of the embedded FLUX: `python -m pytest benchmarks --benchmark-only`.

Plain, and with 10 of 50 steps in full at either tap on Taylor's line; prompts are encoded before
and nothing is decoded. `extra_info` holds what of S / |A| arrives, and the error against the plain
loop that it costs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from _suite import DEVICES, PLACES, label, relative_error, synchronize
from _timing import interleaved, ratios, wall_timer
from torch import Tensor

import lesa

STEPS, FULL = 50, 10
HISTORY = 2  # features on Taylor's line
LIMIT = 1e-3  # fp32 over all steps; the sampler rounds to fp32 in the float64 run too
ROUNDS = 5
PROMPT = lesa.testbed.captions(1, seed=0)[0]
RUNS = [
    *(((device, "eager"), None) for device in DEVICES),
    *((place, tap) for tap in ("output", "hidden") for place in PLACES),
]
Loop = Callable[[], Tensor]


@cache
def pipeline(device: torch.device, dtype: torch.dtype, use: str = "plain") -> tuple[Any, Loop]:
    """The embedded FLUX, one per use, and its loop from encoded prompt to final latents."""
    pipe, settings = lesa.testbed.load("flux"), lesa.testbed.settings("flux")
    embeds, pooled, _ = pipe.encode_prompt(
        PROMPT, None, max_sequence_length=settings["max_sequence_length"]
    )
    tokens = (settings["height"] // 8) * (settings["width"] // 8)  # 2x2 latent pixels each
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(1, tokens, pipe.transformer.config.in_channels, generator=draw)
    inputs = {"latents": latents, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    settings |= {name: value.to(device, dtype) for name, value in inputs.items()}
    settings |= {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
    pipe = pipe.to(device=device, dtype=dtype)

    def loop() -> Tensor:
        latents = pipe(**settings)[0]
        synchronize(device)
        return latents

    return pipe, loop


@cache
def exact_latents(device: torch.device, tap: Any) -> Tensor:
    """The final latents of a run in float64."""
    pipe, loop = pipeline(device, torch.float64)
    with variant(pipe, tap):
        return loop()


def variant(pipe: Any, tap: Any) -> AbstractContextManager[Any]:
    """Accelerated for the length of a block; plain without a tap."""
    if tap is None:
        return nullcontext()
    return lesa.accelerate(pipe, lesa.Taylor(1), full_steps=FULL, tap=tap)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("place", "tap"),
    RUNS,
    indirect=["place"],
    ids=[f"{tap}-tap-{label(place)}" if tap else f"plain-{place[0]}" for place, tap in RUNS],
)
def test_loop(benchmark: Any, place: Any, tap: Any) -> None:
    """Checked against the same run in float64; timed warm."""
    device, info = place.device, benchmark.extra_info
    pipe, loop = pipeline(device, torch.float32, "plain" if tap is None else "accelerated")
    benchmark.group = f"loop on {device}"
    with variant(pipe, tap):
        for _ in range(3 if device.type == "cuda" else 1):  # graphs are recorded in the second
            found = loop().double()
        error = relative_error(found, exact_latents(device, tap))
        assert error <= LIMIT
        info.update(device=str(device), dtype="float32", steps=STEPS, relative_error=error)
        if tap is not None:
            stats = lesa.stats(pipe)
            assert not stats.fallbacks and len(stats.full_steps) == FULL
            moved = stats.ring_bytes // HISTORY * (HISTORY + 1) * (STEPS - FULL)
            lost = relative_error(found, exact_latents(device, None))
            info.update(
                backend=place.backend, tap=tap, full_steps=FULL, graphs=stats.graphs,
                bytes=moved, error_to_plain=lost,
            )  # fmt: skip
            if not benchmark.disabled:
                info["share_of_ideal"] = speedup(loop, device) * FULL / STEPS
        benchmark.pedantic(loop, rounds=ROUNDS)


def speedup(loop: Loop, device: torch.device) -> float:
    """Time of the plain loop over that of this one, median of ratios inside a round."""
    plain = pipeline(device, torch.float32, "plain")[1]
    timers = {"plain": wall_timer(plain), "this": wall_timer(loop)}
    return ratios(interleaved(timers, 3, warmup=1), "plain", "this")["median"]
