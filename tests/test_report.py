"""Comparison and report on the embedded pipeline: the numbers are those of real runs."""

from __future__ import annotations

import json
import re

import pytest
import torch
from PIL import Image

from lesa import Reuse, Schedule, accelerate, stats, testbed
from lesa.errors import LesaError
from lesa.evaluation import build, compare, psnr
from lesa.evaluation.compare import PLAIN
from lesa.evaluation.method import Bench, Method
from lesa.evaluation.report import readable_bytes, rich_table, write_report
from lesa.evaluation.runs import generate, loop_bar, step_flops
from lesa.files import to_json, write_atomically

STEPS = 8
PROMPTS = testbed.captions(3, seed=5)
COLUMNS = [
    "method", "schedule", "full_steps", "psnr_mean", "psnr_p10", "psnr_min",
    "ssim_mean", "seconds", "speedup", "tflops", "cache_bytes",
    "label", "psnr", "psnr_mean_interval", "psnr_p10_interval",
]  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return testbed.load("flux")


@pytest.fixture(scope="module")
def settings():
    return {**testbed.settings("flux"), "num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def comparison(pipe, settings):
    everything = Method("fora", STEPS, Reuse(), Schedule.fora(1, STEPS))
    methods = [build(name, 4, Bench(STEPS)) for name in ("fewer-steps", "fora", "taylorseer-1")]
    return compare(
        pipe, PROMPTS, [*methods, everything], settings, seed=7, batch_size=2, keep_pictures=3
    )


def test_rows_have_exactly_the_agreed_columns(comparison):
    assert [list(row) for row in comparison.rows] == [COLUMNS] * 4
    assert [row["full_steps"] for row in comparison.rows] == [4, 4, 4, STEPS]


def test_decibels_are_those_of_separate_runs(comparison, pipe, settings):
    seeds = (7, 8, 9)
    plain = generate(pipe, PROMPTS, seeds, settings).images
    with accelerate(pipe, Reuse(), schedule=Schedule.explicit((0, 2, 4, 6))):
        cached = generate(pipe, PROMPTS, seeds, settings).images
    decibels = psnr(plain, cached)
    row = comparison.rows[1]
    assert row["psnr_mean"] == pytest.approx(decibels.mean().item(), abs=0.05)  # batches of 2, 1
    assert row["psnr_min"] == pytest.approx(decibels.min().item(), abs=0.05)
    assert row["psnr_min"] <= row["psnr_p10"] <= row["psnr_mean"]
    assert row["psnr"] == pytest.approx(decibels.tolist(), abs=0.05)
    for name in ("psnr_mean", "psnr_p10"):
        low, high = row[f"{name}_interval"]
        assert min(row["psnr"]) <= low <= row[name] <= high <= max(row["psnr"])


def test_every_step_in_full_is_the_plain_run_itself(comparison):
    row = comparison.rows[-1]
    assert row["psnr_min"] == float("inf")
    assert row["ssim_mean"] == pytest.approx(1, abs=1e-5)
    assert not any(comparison.curves[f"fora @{STEPS}"])


def test_curves_begin_at_the_first_skipped_step(comparison):
    curve = comparison.curves["taylorseer-1 @4"]
    assert len(curve) == STEPS
    assert curve[:3] == [0, 0, 0] and all(error > 0 for error in curve[3:])
    assert "fewer-steps @4" not in comparison.curves  # its steps are not the plain run's


def test_flops_follow_the_full_steps(comparison, pipe, settings):
    full = step_flops(pipe, PROMPTS[0], settings, 2)
    assert full[0] == full[1] > 1e8
    assert comparison.plain_tflops == pytest.approx(STEPS * full[0] / 1e12)
    for row in comparison.rows:  # output tap: a skipped step runs no module
        assert row["tflops"] == pytest.approx(row["full_steps"] * full[0] / 1e12, rel=1e-3)


def test_cache_bytes_are_the_rings(comparison, pipe, settings):
    feature = 2 * settings["height"] * settings["width"] // 64 * pipe.transformer.config.in_channels
    assert [row["cache_bytes"] for row in comparison.rows[:3]] == [0, 4 * feature, 8 * feature]


def test_the_pipeline_is_left_as_it_was(comparison, pipe, settings):
    assert "progress_bar" not in vars(pipe)
    with pytest.raises(LesaError, match="not accelerated"):
        stats(pipe)
    again = generate(pipe, PROMPTS[:2], [7, 8], settings).images
    assert torch.equal(again, comparison.pictures[PLAIN][:2])


def test_the_bar_times_the_loop_alone(pipe, settings):
    marks = []
    with loop_bar(pipe, lambda: marks.append(len(marks))) as bar:
        pipe(PROMPTS[0], **settings, output_type="latent")
    assert len(marks) == STEPS + 1
    assert bar.seconds > 0


def test_one_prompt_twice_is_one_picture_twice(pipe, settings):
    """A generator per prompt: the picture does not depend on its place in the batch."""
    run = generate(pipe, [PROMPTS[0], PROMPTS[1], PROMPTS[0]], [3, 4, 3], settings)
    assert torch.allclose(run.images[0], run.images[2], atol=1e-5)
    assert not torch.allclose(run.images[0], run.images[1], atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts"),
        ({"methods": []}, "methods"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"settings": {}}, "num_inference_steps"),
    ],
)
def test_wrong_arguments(pipe, settings, change, message):
    given = {"prompts": PROMPTS, "methods": [build("fora", 4, Bench(STEPS))], "settings": settings}
    with pytest.raises(LesaError, match=message):
        compare(pipe, **{**given, **change})


def test_report_is_complete_and_opens_offline(comparison, tmp_path):
    files = write_report(comparison, tmp_path / "r", shown=("taylorseer-1",), extra={"note": "x"})
    assert set(files) == {"grid.png", "error-per-step.png", "report.html", "report.json"}
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == sorted(files)  # no leftovers
    html = files["report.html"].read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,22})', html)
    assert sources == ["data:image/png;base64,"] * 2
    assert "http" not in html.replace("http-equiv", "")
    for text in ("taylorseer-1", "own: 0,1,2,6", *PROMPTS):
        assert text in html
    width, height = Image.open(files["grid.png"]).size
    assert width > height  # three prompts wide, plain and one method high


def test_report_json_is_strict(comparison, tmp_path):
    path = write_report(comparison, tmp_path)["report.json"]

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    facts = json.loads(path.read_text(), parse_constant=refuse)
    assert facts["rows"][-1]["psnr_mean"] is None  # infinite
    assert facts["prompts"] == PROMPTS
    assert {"python", "torch", "lesa"} <= set(facts["versions"])


def test_terminal_table_fits_80_columns(comparison):
    from rich.console import Console

    console = Console(width=80, record=True, quiet=True)
    with console.capture() as captured:
        console.quiet = False
        console.print(rich_table(comparison.rows, comparison.plain_seconds, STEPS))
    text = captured.get()
    assert "taylorseer-1" in text and "worst decile" in text and "…" not in text


def test_a_failed_write_leaves_no_file(tmp_path):
    target = tmp_path / "a.json"
    with pytest.raises(TypeError):
        write_atomically(target, None)
    assert list(tmp_path.iterdir()) == []
    write_atomically(target, "old")
    with pytest.raises(TypeError):
        write_atomically(target, 5)
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_small_formatting():
    assert [readable_bytes(n) for n in (0, 1536, 3 * 2**20)] == ["0 B", "1.5 KiB", "3 MiB"]
    assert json.loads(to_json({"a": float("inf"), "b": [float("nan"), 1.5]})) == {
        "a": None,
        "b": [None, 1.5],
    }
