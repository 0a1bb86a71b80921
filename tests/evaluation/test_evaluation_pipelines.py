"""Comparisons on other pipelines than the embedded one: videos, embeddings, DeepCache, U-Nets."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tiny_pipelines import build

import lesa
from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.evaluation import Bench, compare, frame_psnr, lpips, psnr, temporal_psnr
from lesa.evaluation import build as method
from lesa.evaluation.methods import PEERS, parse
from lesa.evaluation.metrics_row import COLUMNS, LPIPS_COLUMNS, VIDEO_COLUMNS
from lesa.evaluation.plots import grid_png
from lesa.evaluation.runs import generate
from lesa.forecasters import LesaForecaster
from lesa.forecasters.guard import Guard
from lesa.hooks.prompt_inputs import settings_of
from lesa.util.progress import Bar, Progress

STEPS = 6


def make(name, prompts):
    pipe, call = build(name)
    settings = call(prompts)
    for key in ("generator", "output_type"):
        del settings[key]
    draw = torch.Generator().manual_seed(2)
    for key in ("prompt_embeds", "negative_prompt_embeds"):
        settings[key] = settings[key] + torch.randn(settings[key].shape, generator=draw)
    return pipe, settings


@pytest.fixture(scope="module")
def video():
    pipe, settings = make("wan", 3)
    methods = [method("fora", 3, Bench(STEPS)), method("fora", STEPS, Bench(STEPS))]
    return pipe, settings, compare(pipe, ["a", "b", "c"], methods, settings, seed=5, batch_size=2)


def test_videos_are_judged_whole_by_frame_and_by_motion(video):
    pipe, settings, found = video
    plain, cached = found.pictures["plain"], found.pictures["fora @3"]
    assert plain.shape == (3, 9, 3, 32, 32)
    row, full = found.rows
    assert list(row) == [*COLUMNS, "full_step_list", *LPIPS_COLUMNS, *VIDEO_COLUMNS]
    assert row["psnr_mean"] == pytest.approx(psnr(plain, cached).mean().item())
    assert row["psnr_frame_min"] == pytest.approx(frame_psnr(plain, cached).min().item())
    assert row["temporal_psnr"] == pytest.approx(temporal_psnr(plain, cached).mean().item())
    assert row["psnr_frame_min"] < row["psnr_mean"] < float("inf") == full["psnr_frame_min"]
    assert row["lpips_mean"] == pytest.approx(lpips(plain, cached).mean().item())
    assert row["lpips_max"] == pytest.approx(lpips(plain, cached).max().item())
    assert row["lpips_mean"] > full["lpips_mean"] == 0


def test_pictures_too_small_for_lpips_are_measured_without_it():
    pipe, settings = make("flux", 1)
    small = settings | {"height": 16, "width": 16}
    found = compare(pipe, ["a"], [method("fora", 3, Bench(STEPS))], small)
    assert list(found.rows[0]) == [*COLUMNS, "full_step_list"]
    assert found.notes == [
        "LPIPS was not measured: images: 16 x 16 pixels are too few for LPIPS; give at least 31"
    ]


def test_each_prompt_gets_its_own_embedding_and_seed(video):
    pipe, settings, found = video
    own = {name: part[1:2] if torch.is_tensor(part) else part for name, part in settings.items()}
    alone = generate(pipe, ["b"], [6], own).images
    assert psnr(found.pictures["plain"][1:2], alone).item() > 60
    assert psnr(found.pictures["plain"][:1], alone).item() < 40


def test_several_pictures_per_prompt_have_seeds_of_their_own():
    pipe, settings = make("sdxl", 2)
    settings["num_images_per_prompt"] = 2
    found = compare(pipe, ["a", "b"], [method("fora", 3, Bench(STEPS))], settings, batch_size=1)
    pictures = found.pictures["plain"]
    assert len(pictures) == 4 and found.titles == ["a", "a", "b", "b"]
    assert len(found.rows[0]["psnr"]) == 4
    assert len({round(float(p.double().sum()), 6) for p in pictures}) == 4
    together = generate(pipe, ["a", "b"], range(4), settings).images
    assert psnr(pictures, together).min() > 60


def test_worst_pictures_of_several_per_prompt_are_whole_prompts():
    """Made again in another order, each with the settings and seeds of its own prompt."""
    pipe, settings = make("sdxl", 3)
    settings["num_images_per_prompt"] = 2
    mine = replace(method("fora", 3, Bench(STEPS)), name="lesa")
    bars: list[Bar] = []

    class Bars(Progress):
        @contextmanager
        def bar(self, *about):
            with super().bar(*about) as bar:
                yield bars.append(bar) or bar

    found = compare(
        pipe, ["a", "b", "c"], [mine], settings, batch_size=2, progress=Bars(quiet=True)
    )
    assert [bar.title for bar in bars] == ["count operations", "compare", "worst prompts"]
    for bar in bars[1:]:  # the time left is told, and ends at 0
        assert bar.completed == pytest.approx(bar.total) and bar.total > 0
    (worst,), (row,) = found.worst, found.rows
    hardest = min(range(6), key=row["psnr"].__getitem__) // 2
    assert worst.prompts[:2] == [found.titles[2 * hardest]] * 2 and len(worst.prompts) == 6
    order = [2 * "abc".index(title) + n % 2 for n, title in enumerate(worst.prompts)]
    assert worst.decibels[row["label"]] == [row["psnr"][i] for i in order]
    for label, pictures in worst.pictures.items():
        assert psnr(found.pictures[label][order], pictures).min() > 60


def test_a_strip_of_frames_is_wider_than_a_picture():
    from io import BytesIO

    from PIL import Image

    def size(*shape):
        return Image.open(BytesIO(grid_png({"plain": torch.rand(shape)}, ["a", "b"]))).size

    picture, video = size(2, 3, 16, 16), size(2, 9, 3, 16, 16)
    assert video[0] > 3 * picture[0]


def test_deepcache_at_interval_one_is_the_plain_run_and_leaves_no_trace():
    pytest.importorskip("DeepCache")
    pipe, settings = make("sdxl", 2)
    methods = [
        method("deepcache", STEPS, Bench(STEPS, pipe)),
        method("deepcache", 2, Bench(STEPS, pipe)),
    ]
    found = compare(pipe, ["a", "b"], methods, settings)
    every, third = found.rows
    assert every["psnr_min"] == float("inf") and every["full_steps"] == STEPS
    assert third["schedule"] == "own: 0,3" and 0 < third["psnr_mean"] < float("inf")
    full = found.plain_tflops / STEPS
    assert 2 * full < third["tflops"] < 6 * full  # part of the U-Net runs at every step
    assert third["cache_bytes"] > 0
    assert not any("forward" in module.__dict__ for module in pipe.unet.modules())
    again = generate(pipe, ["a", "b"], range(2), settings).images
    assert torch.equal(again, found.pictures["plain"])


def test_deepcache_recomputes_the_outermost_layers_only():
    """Its published cache branch 0: which residual blocks run at a skipped step."""
    pytest.importorskip("DeepCache")
    pipe, settings = make("sdxl", 1)
    runs, cache = [], method("deepcache", 2, Bench(STEPS, pipe)).applied
    blocks = {n: m for n, m in pipe.unet.named_modules() if n.split(".")[-2:-1] == ["resnets"]}
    watched = {"conv_in": pipe.unet.conv_in} | {n: m.conv1 for n, m in blocks.items()}
    with cache(pipe):
        handles = [
            module.register_forward_hook(lambda *_, name=name: runs.append(name))
            for name, module in watched.items()
        ]
        generate(pipe, ["a"], [0], settings | {"output_type": "pt"})
        for handle in handles:
            handle.remove()
    steps = [[]]
    for name in runs:
        steps = [*steps, [name]] if name == "conv_in" else [*steps[:-1], [*steps[-1], name]]
    full, skipped = steps[1], steps[2]
    assert len(steps) == STEPS + 1 and len(full) == len(watched)
    assert skipped == ["conv_in", "up_blocks.1.resnets.1"]


def test_deepcache_needs_a_unet():
    pipe, settings = make("wan", 1)
    with pytest.raises(LesaError, match="'deepcache': it needs a U-Net, WanPipeline has none"):
        method("deepcache", 2, Bench(STEPS, pipe))


@pytest.mark.parametrize(("wanted", "interval"), [(17, 3), (10, 5), (5, 10), (50, 1), (1, 50)])
def test_deepcache_intervals(wanted, interval):
    built = PEERS["deepcache"].build("deepcache", wanted, Bench(50), None)
    assert built.applied.keywords == {"interval": interval}
    assert "deepcache" not in parse("all", Bench(50))


def test_names_are_not_methods():
    with pytest.raises(LesaError, match=r"methods=\['fora'\]: names are not enough; give what"):
        compare(None, ["a"], ["fora"], {"num_inference_steps": STEPS})


def test_a_row_with_a_guard_has_the_mean_number_of_full_steps():
    """Prompt by prompt, since a batch would follow its worst picture."""
    pipe, settings = make("flux", 3)
    plan, more = (Schedule.explicit(steps, STEPS) for steps in ((0, 2), (0, 2, 4)))
    fields = {"history": 1, "uses_latent": False, "num_steps": STEPS}
    forecaster = LesaForecaster("table", branches=("cond", "uncond"), **fields)
    generate(pipe, ["a"], [5], settings_of(settings, [0], 3))
    sigmas = tuple(pipe.scheduler.sigmas.double().tolist())
    rows = torch.ones(STEPS, 1, dtype=torch.float64)
    rows[[0, 2]] = 0
    for branch in forecaster.branches:
        forecaster.correct(plan, sigmas, branch, rows)
    entry = forecaster.calibrations[0]
    entry.guard = Guard(2, 1e9, more)
    risks = []
    with lesa.accelerate(pipe, forecaster):
        for i in range(3):
            generate(pipe, ["a"], [5 + i], settings_of(settings, [i], 3))
            risks.append(lesa.stats(pipe).risk)
    entry.guard = Guard(2, sum(sorted(risks)[1:]) / 2, more)
    mine = method("lesa", 2, Bench(STEPS, forecaster=forecaster))
    found = compare(pipe, ["a", "b", "c"], [mine], settings, seed=5)
    assert found.rows[0]["full_steps"] == pytest.approx(2 + 1 / 3)
    assert "guard: spend" in found.rows[0]["schedule"]
