"""The embedded pipelines on a pretended GPU: nothing meets across devices, and the host waits for
no skipped step."""

from __future__ import annotations

import sys
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch

import lesa
from lesa.cli.inputs import load_pipeline
from lesa.engine import ring
from lesa.evaluation import Method, compare
from lesa.forecasters.guard import Guard
from lesa.testbed import prompts, settings
from lesa.util.progress import Progress

STEPS, COUNT = 4, 2
FULL = lesa.Schedule.explicit((0, 2), STEPS)
TAPS = ("output", "hidden")
PIPELINES = ("flux", "qwen", pytest.param("hunyuan", marks=pytest.mark.slow), "sdxl")

# How often lesa makes the host wait in one generation: for the noise levels, which flow matching's
# scheduler keeps on the device, and beside that at the first generation of a plan for the rows of
# each guidance branch and for the slot numbers of a ring.
LEVELS = {"flux": 1, "qwen": 1, "hunyuan": 1, "sdxl": 0}
BRANCHES = {"flux": 1, "qwen": 2, "hunyuan": 1, "sdxl": 1}
SLOTS = 1


@pytest.fixture(scope="module", params=PIPELINES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def on_host(name) -> dict[str, torch.Tensor]:
    """Final latents of the plain run and, by tap, of an accelerated one on the CPU."""
    pipe = load_pipeline(name, device="cpu")
    found = {"plain": generate(pipe, name)}
    for tap in TAPS:
        with lesa.accelerate(pipe, lesa.Taylor(order=1), schedule=FULL, tap=tap):
            found[tap] = generate(pipe, name)
    return found


@pytest.fixture(scope="module")
def pipe(on_host, gpu, name) -> Any:
    """After `on_host`: what asks at its import whether there is a GPU has been imported."""
    return load_pipeline(name, device="cuda:0")


@pytest.fixture(scope="module")
def trained(pipe, name) -> dict[str, Any]:
    """By tap, a forecaster that was trained on the pretended GPU."""
    return {tap: train(pipe, name, tap) for tap in TAPS}


def call(name: str) -> dict[str, Any]:
    return {**settings(name), "num_inference_steps": STEPS}


def generate(pipe: Any, name: str, after_step: Any = None) -> torch.Tensor:
    """Final latents of one prompt."""
    noise = torch.Generator().manual_seed(7)
    return pipe(
        prompt=prompts(name, 1),
        generator=[noise],
        output_type="latent",
        return_dict=False,
        callback_on_step_end=after_step,
        **call(name),
    )[0]


def train(pipe: Any, name: str, tap: str) -> Any:
    """With few iterations of the fit that runs on the host alone."""
    module = sys.modules["lesa.training.train"]
    with pytest.MonkeyPatch.context() as patches:
        short = partial(module.fit_continuous, iterations=10)
        patches.setattr(module, "fit_continuous", short)
        texts = prompts(name, 2, split="train")
        more = {"refine": 1, "polish": 1, "progress": Progress(quiet=True)}
        return lesa.train(pipe, texts, STEPS, COUNT, tap=tap, call=settings(name), **more)


def watched(gpu: Any, pipe: Any, name: str) -> tuple[torch.Tensor, list[Any], Counter[int]]:
    """One generation: its latents, lesa's reads, and all reads after its first step, by step."""
    by_step: Counter[int] = Counter()
    seen = len(gpu.reads)

    def count(_pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal seen
        by_step[step] = len(gpu.reads) - seen
        seen = len(gpu.reads)
        return tensors

    with gpu.watched("lesa") as reads:
        latents = generate(pipe, name, count)
    del by_step[0]  # with all that comes before it: prompts, noise, sigmas
    assert len(by_step) == STEPS - 1
    return latents, reads, +by_step


def check_generations(gpu: Any, pipe: Any, name: str) -> torch.Tensor:
    """Three generations with the cache that is on: no step but the first waits, none falls back."""
    ring._slots.cache_clear()
    for generation in range(3):
        latents, reads, waits = watched(gpu, pipe, name)
        # Once: slot numbers. Later: whether the last generation's full steps were finite.
        first = BRANCHES[name] + SLOTS if generation == 0 else 1
        assert len(reads) == LEVELS[name] + first, reads
        assert not waits
    stats = lesa.stats(pipe)
    calls = 3 * BRANCHES[name]
    assert stats.fallbacks == {}
    assert (stats.full, stats.skipped) == (calls * COUNT, calls * (STEPS - COUNT))
    return latents


def test_a_plain_run_is_the_hosts(on_host, gpu, pipe, name):
    latents, reads, waits = watched(gpu, pipe, name)
    assert latents.device == torch.device("cuda:0") and not reads and not waits
    # Attention is summed in another order there than in the CPU's fused kernel.
    torch.testing.assert_close(latents.cpu(), on_host["plain"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tap", TAPS)
def test_a_formula_is_run_without_a_wait(gpu, pipe, name, on_host, tap):
    with lesa.accelerate(pipe, lesa.Taylor(order=1), schedule=FULL, tap=tap):
        latents = check_generations(gpu, pipe, name)
        graphs = lesa.stats(pipe).graphs
    torch.testing.assert_close(latents.cpu(), on_host[tap], rtol=1e-3, atol=1e-3)
    recorded = tap == "hidden" and name in ("flux", "qwen")
    assert graphs == ({"captured": 3 * BRANCHES[name]} if recorded else {})


@pytest.mark.parametrize("tap", TAPS)
def test_a_trained_forecaster_is_run_without_a_wait(gpu, pipe, name, trained, tap):
    with torch.inference_mode():  # as servers do; the formula is run without it
        plain = generate(pipe, name)
        with lesa.accelerate(pipe, trained[tap], full_steps=COUNT):
            fast = check_generations(gpu, pipe, name)
        error = float((fast - plain).norm() / plain.norm())
    assert 0 < error < 1  # it is another picture, and no noise


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("kind", ["route", "spend"])
def test_a_guard_waits_once_at_its_step(gpu, pipe, name, trained, tap, kind):
    """And graphs of skipped steps behind it belong to what it runs then."""
    known = trained[tap]
    sigmas = known.calibrations[0].sigmas
    plan, other = (
        lesa.Schedule.explicit(steps, STEPS)
        for steps in (((0, 1, 2), (0, 1, 3)) if kind == "route" else ((0, 1), (0, 1, 2)))
    )
    fields = {"history": 2, "tap": tap, "uses_latent": tap == "output", "num_steps": STEPS}
    forecaster = lesa.LesaForecaster("table", branches=known.branches, **fields)

    def rows(schedule: lesa.Schedule) -> torch.Tensor:
        found = torch.zeros(STEPS, 2 + (tap == "output"), dtype=torch.float64, device="cpu")
        found[list(schedule.skipped_steps), :2] = torch.tensor([1.5, -0.5]).double()
        return found

    for branch in known.branches:
        forecaster.correct(plan, sigmas, branch, rows(plan))
    routed = {branch: rows(other) for branch in known.branches} if kind == "route" else {}
    forecaster.calibrations[0].guard = Guard(1, 0.0, other, routed)
    with lesa.accelerate(pipe, forecaster, schedule=plan):
        generate(pipe, name)
        latents, _, waits = watched(gpu, pipe, name)
        found = lesa.stats(pipe)
    assert waits == {1: 1}
    assert found.fallbacks == {} and found.guarded == 2 and found.full_steps == other.full_steps
    captures = BRANCHES[name] if tap == "hidden" and name in ("flux", "qwen") else 0
    assert found.graphs.get("captured", 0) == captures
    with lesa.accelerate(pipe, forecaster, schedule=other):
        expected = generate(pipe, name)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_what_is_trained_lies_on_the_host(trained):
    for forecaster in trained.values():
        (entry,) = forecaster.calibrations
        for rows in (*entry.rows.values(), *entry.split.values(), *forecaster.parameters()):
            assert rows.is_cpu and type(rows) in (torch.Tensor, torch.nn.Parameter)


def test_methods_are_compared(gpu, pipe, name, trained):
    methods = [
        Method("fora", STEPS, lesa.Reuse(), FULL),
        Method("hidden", STEPS, lesa.Taylor(order=1, tap="hidden"), FULL),
        *(Method(f"lesa-{tap}", STEPS, f, f.calibrated[0]) for tap, f in trained.items()),
    ]
    result = compare(pipe, prompts(name, 1), methods, call(name), keep_pictures=1)
    assert [note for note in result.notes if "in full" in note] == []
    rows = {row["method"]: row for row in result.rows}
    for row in rows.values():
        assert 5 < row["psnr_mean"] < 100 and row["tflops"] < result.plain_tflops
        assert row["cache_bytes"] > 0 and row["peak_bytes"] == 0  # pretended memory is not counted
    assert all(picture.is_cpu for picture in result.pictures.values())
    assert set(result.curves) == {method.label for method in methods}
