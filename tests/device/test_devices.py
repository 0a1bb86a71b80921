"""A pipeline on a device that is not the current one, a device without float64, and the peers."""

from __future__ import annotations

import sys
from functools import cache, partial
from typing import Any

import pytest
import torch

import lesa
from lesa.cli.inputs import load_pipeline
from lesa.evaluation import Bench, build
from lesa.evaluation.metrics import psnr
from lesa.evaluation.peers.speca import speca
from lesa.evaluation.peers.teacache import FLUX, teacache
from lesa.evaluation.runs import generate
from lesa.testbed import prompts, settings
from lesa.training.row_fit import ridge_fit
from lesa.training.statistics import inner_products
from lesa.util import numerics
from lesa.util.numerics import float64

STEPS = 4
CALL = {**settings("flux"), "num_inference_steps": STEPS, "output_type": "latent"}
SECOND = torch.device("cuda:1")
PEERS = ("freqca", "toca", "duca", "clusca", "fewer-steps-dpm++", "fewer-steps-unipc")


@pytest.fixture(scope="module")
def host() -> Any:
    return load_pipeline("flux", device="cpu")


@pytest.fixture(scope="module")
def pipe(host, gpu) -> Any:
    """After `host`: what asks at its import whether there is a GPU has been imported."""
    return load_pipeline("flux", device="cuda:1")


@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_kernels_and_graphs_run_where_the_pipeline_is(gpu, pipe, tap):
    gpu.launches.clear()
    with lesa.accelerate(pipe, lesa.Taylor(), schedule=lesa.Schedule.fora(2, STEPS), tap=tap):
        latents = generate(pipe, prompts("flux", 1), [0], CALL).images
        stats = lesa.stats(pipe)
    assert stats.fallbacks == {} and stats.skipped == 2 and latents.isfinite().all()
    assert stats.graphs == ({"captured": 1} if tap == "hidden" else {})
    assert {device for _, device in gpu.launches} == {SECOND}
    assert torch.cuda.current_device() == 0


def test_a_device_is_trained_on_as_the_host_is(host, gpu, pipe, monkeypatch):
    module = sys.modules["lesa.training.train"]
    monkeypatch.setattr(module, "fit_continuous", partial(module.fit_continuous, iterations=5))
    texts, more = prompts("flux", 2, split="train"), {"refine": 1, "polish": 1, "progress": False}
    found = []
    for where in (host, pipe):
        (entry,) = lesa.train(where, texts, STEPS, 2, call=settings("flux"), **more).calibrations
        found.append((entry.schedule, entry.rows["cond"]))
    (schedule, rows), (same, others) = found
    assert schedule == same
    # Attention is summed in another order, and least squares pass the difference on.
    torch.testing.assert_close(rows, others, rtol=0, atol=1e-3)


@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_the_papers_form_is_trained_and_run_without_a_wait(gpu, pipe, monkeypatch, tap):
    module = sys.modules["lesa.training.train"]
    monkeypatch.setattr(module, "fit_paper", partial(module.fit_paper, iterations=3))
    schedule, texts = lesa.Schedule.fora(2, STEPS), prompts("flux", 1)
    forecaster = lesa.train(
        pipe, texts, STEPS, 2, form="paper", tap=tap, schedule=schedule,
        call=settings("flux"), progress=False,
    )  # fmt: skip
    with lesa.accelerate(pipe, forecaster, schedule=schedule):
        generate(pipe, texts, [0], CALL)
        with gpu.watched("lesa") as reads:
            generate(pipe, texts, [0], CALL)
        assert lesa.stats(pipe).fallbacks == {}
    timing = ("evaluation/", "hooks/timed_run.py")
    here = [read for read in reads if not read.place.startswith(timing)]
    # The second: whether the last generation's full steps were finite, at its first step.
    places = [read.place.split(":")[0] for read in here]
    assert places == ["hooks/noise_levels.py", "engine/stats.py"]


def test_without_float64_sums_are_taken_on_the_host(gpu, monkeypatch):
    torch.manual_seed(0)
    basis = torch.randn(4, 50)
    pictures = basis.sigmoid()
    start = torch.zeros(3).double()
    expected = inner_products(basis), ridge_fit([*basis[:3]], basis[3], start, 1e-3)
    quality = psnr(pictures[:2], pictures[2:])
    monkeypatch.setattr(gpu, "has_float64", False)
    monkeypatch.setattr(numerics, "_has_float64", cache(numerics._has_float64.__wrapped__))
    there, shown = basis.to(SECOND), pictures.to(SECOND)
    with pytest.raises(TypeError):
        there.double()
    assert float64(there).is_cpu
    torch.testing.assert_close(inner_products(there), expected[0])
    fitted = ridge_fit([*there[:3]], there[3], torch.zeros(3).double(), 1e-3)
    torch.testing.assert_close(fitted, expected[1])
    torch.testing.assert_close(psnr(shown[:2], shown[2:]), quality)


def test_float64_is_used_where_there_is_any(gpu):
    assert float64(torch.ones(2, device="cuda:0")).device == torch.device("cuda:0")


@pytest.mark.parametrize("name", [*PEERS, "teacache", "speca"])
def test_peers_run_on_a_device(gpu, pipe, name):
    if name in PEERS:
        applied = build(name, 2, Bench(STEPS, pipe, CALL)).applied
    else:
        applied = teacache(0.1, FLUX) if name == "teacache" else speca(1.0)
    with applied(pipe) as use:
        latents = generate(pipe, prompts("flux", 1), [0], CALL).images
        held = use.cache_bytes()
    assert latents.is_cpu and latents.isfinite().all()
    assert held > 0 or name.startswith("fewer-steps")
