"""The whole on a CUDA device: kernels against eager, graphs, waits, memory, training.

Skipped without a GPU; LESA_TEST_DEVICE=auto runs on the CPU what makes sense there.
"""

from __future__ import annotations

import gc
import os
import weakref
from functools import cache

import pytest
import torch

import lesa
from lesa.engine.controller import CacheController
from lesa.engine.trajectory import Trajectory
from lesa.evaluation.compare import compare
from lesa.evaluation.method import Bench
from lesa.evaluation.methods import build_all, parse
from lesa.testbed import captions, load, settings

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("LESA_TEST_DEVICE") != "auto", reason="needs a CUDA device"
)
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")

NAMES, TAPS = ("flux", "qwen", "sdxl"), ("output", "hidden")
STEPS, FULL = 12, (0, 1, 2, 5, 9)
CASES = [(name, tap) for name in NAMES for tap in TAPS]
MIB = 1 << 20


@cache
def pipeline(name):
    pipe = load(name).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, name, steps=STEPS, seed=0, **more):
    """The final latents of one prompt."""
    call = {**settings(name), "num_inference_steps": steps, "output_type": "latent", **more}
    draw = torch.Generator("cpu").manual_seed(seed)
    found = pipe(prompt=captions(1, seed=9, split="test"), generator=draw, **call)
    return found[0] if isinstance(found, tuple) else next(iter(vars(found).values()))


def accelerated(pipe, tap, order=2, **options):
    schedule = lesa.Schedule.explicit(FULL, STEPS)
    return lesa.accelerate(pipe, lesa.Taylor(order=order), schedule=schedule, tap=tap, **options)


def undisturbed(stats):
    """All skipped steps were forecast."""
    assert stats.fallbacks == {} and stats.skipped > 0
    return stats


@pytest.mark.parametrize(("name", "tap"), CASES)
def test_triton_agrees_with_eager_in_three_generations(name, tap, monkeypatch):
    pipe, found = pipeline(name), {}
    for backend in ("auto", "eager"):
        monkeypatch.setenv("LESA_BACKEND", backend)
        with accelerated(pipe, tap):
            found[backend] = [generate(pipe, name) for _ in range(3)]
            undisturbed(lesa.stats(pipe))
    first, *later = found["auto"]
    for again in later:
        assert torch.equal(first, again)
    error = (first - found["eager"][0]).norm() / found["eager"][0].norm()
    assert error < 1e-4  # fp32 sums in another order, through at most six more full steps


@needs_cuda
@pytest.mark.parametrize("name", ("flux", "qwen"))
def test_graphs_change_no_bit(name):
    pipe = pipeline(name)
    with accelerated(pipe, "hidden"):
        on = [generate(pipe, name, seed=seed) for seed in range(3)]
        counts = lesa.stats(pipe).graphs
    with accelerated(pipe, "hidden", graph="off"):
        off = [generate(pipe, name, seed=seed) for seed in range(3)]
    assert counts.get("captured", 0) >= 1 and not counts.get("failed")
    for with_graph, without in zip(on, off, strict=True):
        assert torch.equal(with_graph, without)


@needs_cuda
@pytest.mark.parametrize(("name", "tap"), CASES)
def test_no_skipped_step_waits_for_the_device(name, tap, monkeypatch):
    """From the call of the model to its output; full steps and a generation's begin may wait."""
    inner, watched = CacheController.__call__, []

    def call(controller, denoiser, args, kwargs):
        skips = bool(watched) and watched[-1]
        torch.cuda.set_sync_debug_mode("error" if skips else "default")
        try:
            return inner(controller, denoiser, args, kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(CacheController, "__call__", call)

    def before(_pipe, step, _time, values):  # called at the end of a step: tells of the next
        watched[:] = [step + 1 < STEPS and step + 1 not in FULL]
        return values

    pipe = pipeline(name)
    with accelerated(pipe, tap):
        for _ in range(3):
            watched[:] = [False]
            generate(pipe, name, callback_on_step_end=before)
        undisturbed(lesa.stats(pipe))


@needs_cuda
def test_captures_share_one_workspace():
    """Three sizes, three captures: what stays allocated is little beside one cuBLAS workspace."""
    pipe, held = pipeline("flux"), []
    with accelerated(pipe, "hidden"):
        for size in (64, 96, 128):
            for _ in range(2):
                generate(pipe, "flux", height=size, width=size)
            gc.collect()
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated())
        assert lesa.stats(pipe).graphs.get("captured", 0) >= 3
    print("bytes allocated after each capture:", held)
    assert held[-1] - held[0] < 8 * MIB  # one workspace is 8 to 32 MiB


@pytest.mark.parametrize("tap", TAPS)
def test_the_ring_is_gone_before_decoding(tap, monkeypatch):
    """The moment of peak memory. With graphs one cuBLAS workspace more stays, not one a capture."""
    pipe, rings, held = pipeline("flux"), [], []
    inner, keep = pipe.vae.decode, Trajectory.keep

    def remember(self, *args):
        feature = keep(self, *args)
        if feature is not None and self.ring.pushed == 1:
            rings.append(weakref.ref(self.ring.data))
        return feature

    def decode(*args, **kwargs):
        assert all(ring() is None for ring in rings)
        held.append(torch.cuda.memory_allocated() if CUDA else 0)
        return inner(*args, **kwargs)

    monkeypatch.setattr(Trajectory, "keep", remember)
    monkeypatch.setattr(pipe.vae, "decode", decode)

    def run(times):
        for _ in range(times):
            generate(pipe, "flux", output_type="pt", height=256, width=256)
        return held[-1]

    plain = run(2)
    with accelerated(pipe, tap):
        assert run(3) - plain <= (40 * MIB if tap == "hidden" else MIB // 2)
    assert len(rings) == 3


@pytest.mark.parametrize(("name", "tap"), [*CASES, ("hunyuan", "output")])
def test_train_enable_compare(name, tap):
    """The main job: nothing of it may mix the host's tensors with the device's."""
    pipe, call = pipeline(name), dict(settings(name))
    call.pop("num_inference_steps")
    prompts = captions(2, seed=0, split="train")
    forecaster = lesa.train(
        pipe, prompts, 8, 4, call=call, tap=tap, refine=1, polish=1, progress=False
    )
    with lesa.accelerate(pipe, forecaster, full_steps=4):
        latents = generate(pipe, name, steps=8)
        assert latents.device.type == DEVICE and latents.isfinite().all()
        undisturbed(lesa.stats(pipe))
    compared(pipe, name, prompts, forecaster, ["lesa", "taylor-1", "fora"])


def compared(pipe, name, prompts, forecaster, methods):
    """`lesa compare`'s measuring, 4 of 8 steps in full."""
    asked = {**settings(name), "num_inference_steps": 8}
    bench = Bench(8, pipe, asked, prompts, forecaster)
    methods = build_all(parse(methods, bench), [4], bench)
    found = compare(pipe, prompts, methods, asked, batch_size=2, keep_pictures=1)
    assert len(found.rows) == len(methods)
    assert all(row["psnr_mean"] > 5 for row in found.rows)


def test_training_asks_for_its_own_gradients():
    """Servers and scripts call it under no_grad or in inference mode."""
    pipe, call = pipeline("flux"), dict(settings("flux"))
    call.pop("num_inference_steps")
    with torch.inference_mode():
        lesa.train(
            pipe, captions(1, seed=0, split="train"), 6, 3,
            call=call, refine=0, polish=0, progress=False,
        )  # fmt: skip


@needs_cuda
def test_every_peer_runs_on_the_device():
    pipe, call = pipeline("flux"), dict(settings("flux"))
    call.pop("num_inference_steps")
    prompts = captions(2, seed=0, split="train")
    forecaster = lesa.train(
        pipe, prompts, 8, 4, call=call, refine=0, polish=0, progress=False
    )  # fmt: skip
    compared(pipe, "flux", prompts, forecaster, ["all"])
