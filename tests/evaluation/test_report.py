"""Comparison and report on the embedded pipeline: the numbers are those of real runs."""

from __future__ import annotations

import json
import re
from unittest import mock

import pytest
import torch
from markupsafe import escape
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from lesa import Reuse, Schedule, Taylor, accelerate, stats, testbed
from lesa.errors import LesaError
from lesa.evaluation import build, compare, psnr, psnr_u8wrap
from lesa.evaluation.charts import quality_png
from lesa.evaluation.compare import PLAIN
from lesa.evaluation.judges import attributes
from lesa.evaluation.method import Bench, Method
from lesa.evaluation.ranking import best_peer, duels, opponents
from lesa.evaluation.report import _limit, readable_bytes, rich_table, write_report
from lesa.evaluation.runs import generate, loop_bar, step_flops
from lesa.util.files import write_atomically
from lesa.util.strict_json import to_json

STEPS = 8
PROMPTS = testbed.captions(3, seed=5)
LPIPS_COLUMNS = ["lpips_mean", "lpips_max", "lpips_mean_interval"]
COLUMNS = [
    "method", "schedule", "full_steps", "psnr_mean", "psnr_p10", "psnr_min",
    "ssim_mean", "seconds", "speedup", "tflops", "cache_bytes",
    "label", "psnr", "psnr_mean_interval", "psnr_p10_interval", "cpu_seconds",
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
    methods = [build(name, 4, Bench(STEPS)) for name in ("fewer-steps", "fora", "taylor-1")]
    return compare(
        pipe, PROMPTS, [*methods, everything], settings, seed=7, batch_size=2, keep_pictures=3
    )


def test_rows_have_exactly_the_agreed_columns(comparison):
    shorter = [*COLUMNS, *LPIPS_COLUMNS]
    listed = [*COLUMNS, "full_step_list", *LPIPS_COLUMNS]  # a shorter run has no such list
    assert [list(row) for row in comparison.rows] == [shorter, listed, listed, listed]
    assert comparison.rows[2]["full_step_list"] == [0, 1, 2, 6]
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
    curve = comparison.curves["taylor-1 @4"]
    assert len(curve) == STEPS
    assert curve[:3] == [0, 0, 0] and all(error > 0 for error in curve[3:])
    assert "fewer-steps @4" not in comparison.curves  # its steps are not the plain run's


def test_noise_levels_are_those_of_the_plain_run(comparison, pipe):
    levels = comparison.to_dict()["noise_levels"]
    assert len(levels) == STEPS + 1 and levels[0] == 1 and levels[-1] == 0
    assert levels == sorted(levels, reverse=True)


def test_flops_follow_the_full_steps(comparison, pipe, settings):
    full = step_flops(pipe, PROMPTS[0], settings, 2)
    assert full[0] == full[1] > 1e8
    assert comparison.plain_tflops == pytest.approx(STEPS * full[0] / 1e12)
    for row in comparison.rows:  # output tap: a skipped step runs no module
        assert row["tflops"] == pytest.approx(row["full_steps"] * full[0] / 1e12, rel=1e-3)


def test_attention_is_counted_on_the_cpu_too(pipe, settings):
    """2 products of L x L x D for each head of each block are among a step's operations."""
    config, side = pipe.transformer.config, settings["height"] // 8
    length = side * side + settings["max_sequence_length"]
    width = config.num_attention_heads * config.attention_head_dim
    blocks = config.num_layers + config.num_single_layers
    plain = FlopCounterMode(display=False)  # knows the matrix products alone
    call = {**settings, "output_type": "latent", "num_inference_steps": 1}
    with plain:
        pipe(PROMPTS[0], **call)
    counted = plain.get_flop_counts()["FluxTransformer2DModel"]
    assert not any("attention" in str(operator) for operator in counted)
    full = step_flops(pipe, PROMPTS[0], settings, 1)[0]
    assert full - sum(counted.values()) == blocks * 4 * length**2 * width


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


def test_a_bar_inside_another_gives_the_place_back(pipe):
    with loop_bar(pipe) as outer:
        with loop_bar(pipe):
            assert pipe.progress_bar is not outer
        assert pipe.progress_bar is outer
    assert "progress_bar" not in vars(pipe)


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
        ({"batch_size": 0}, "batch_size=0: below 1"),
        ({"settings": {}}, "num_inference_steps"),
    ],
)
def test_wrong_arguments(pipe, settings, change, message):
    given = {"prompts": PROMPTS, "methods": [build("fora", 4, Bench(STEPS))], "settings": settings}
    with pytest.raises(LesaError, match=message):
        compare(pipe, **{**given, **change})


FIGURES = {
    "quality-full-steps.png", "quality-seconds.png", "quality-tflops.png", "error-per-step.png",
    "grid.png",
}  # fmt: skip


def test_report_is_complete_and_opens_offline(comparison, tmp_path):
    files = write_report(comparison, tmp_path / "r", shown=("taylor-1",), extra={"note": "x"})
    assert set(files) == {*FIGURES, "report.html", "report.json"}
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == sorted(files)  # no leftovers
    html = files["report.html"].read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,22})', html)
    assert set(sources) == {"data:image/png;base64,"}
    assert "://" not in html and "identical" in html
    for text in ("taylor-1", "own: 0,1,2,6", *PROMPTS, *comparison.notes):
        assert str(escape(text)) in html
    width, height = Image.open(files["grid.png"]).size
    assert width > height  # three prompts wide, plain and one method high


@pytest.fixture(scope="module")
def contest(pipe, settings):
    """ "lesa" by name (a forecaster of a formula stands in) against two peers, judged."""
    mine = Method("lesa", STEPS, Taylor(1), Schedule.explicit((0, 2, 4, 6), STEPS), "searched")
    paper = Method("lesa-paper", STEPS, Reuse(), Schedule.fora(2, STEPS))
    peers = [build("fora", 4, Bench(STEPS)), paper]
    return compare(pipe, PROMPTS, [mine, *peers], settings, seed=7, judges=[attributes])


def test_judges_see_every_method_and_the_plain_run(contest):
    from lesa_testbed.checker import accuracy

    def check(pictures):
        return accuracy(pictures.movedim(1, -1).numpy(), PROMPTS)

    plain = contest.to_dict()["plain"]["scores"]
    assert {k: v["value"] for k, v in plain.items()} == pytest.approx(
        check(contest.pictures[PLAIN])
    )
    for row in contest.rows:
        found = check(contest.pictures[row["label"]])
        for name, share in found.items():
            part = row["scores"][name]
            assert part["value"] == pytest.approx(share)
            assert part["low"] <= part["value"] <= part["high"]
            assert part["difference"]["value"] == pytest.approx(share - plain[name]["value"])


def test_the_papers_psnr_is_told_of_the_papers_recipe_only(contest):
    told = {row["method"]: row.get("psnr_u8wrap") for row in contest.rows}
    expected = psnr_u8wrap(contest.pictures[PLAIN], contest.pictures["lesa-paper @4"])
    assert told == {
        "lesa": None,
        "fora": None,
        "lesa-paper": pytest.approx(expected.mean().item()),
    }


def test_worst_prompts_are_those_of_lesa_made_once_more(contest):
    (worst,) = contest.worst
    row = contest.rows[0]
    order = sorted(range(3), key=lambda i: row["psnr"][i])
    best = best_peer(contest.rows, 4)["label"]
    assert worst.prompts == [PROMPTS[i] for i in order]
    assert list(worst.pictures) == [PLAIN, "lesa @4", best]
    for label, pictures in worst.pictures.items():
        assert torch.allclose(pictures, contest.pictures[label][order], atol=1e-4)
    assert worst.decibels["lesa @4"] == [row["psnr"][i] for i in order]


def test_rows_outlive_pictures_that_cannot_be_made_again(pipe, settings, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("no memory\nleft")

    monkeypatch.setattr("lesa.evaluation.contest.Contest.worst", fails)
    mine = Method("lesa", STEPS, Reuse(), Schedule.explicit((0, 4), STEPS), "searched")
    found = compare(pipe, PROMPTS[:1], [mine], settings)
    assert found.worst == [] and found.rows[0]["psnr_mean"] > 10
    assert found.notes[-1] == (
        "the sheet of the worst prompts of lesa @2 was not made: OutOfMemoryError: no memory"
    )


def test_report_with_lesa_shows_where_it_stands(contest, tmp_path):
    files = write_report(contest, tmp_path)
    assert set(files) == {
        *FIGURES, "paired.png", "worst-4.png", "report.html", "report.json",
    }  # fmt: skip
    html = files["report.html"].read_text()
    for text in ("Where lesa is worst", "paper's PSNR", "lesa and the best peers"):
        assert text in html
    facts = json.loads(files["report.json"].read_text())
    assert [(d["a"], d["b"]) for d in facts["paired"]] == [
        (d["a"], d["b"]) for d in duels(contest.rows)
    ]
    assert {"low", "high", "value"} <= set(facts["rows"][0]["scores"]["shape"]["difference"])


def test_who_does_not_come_down_to_the_count_is_no_opponent():
    """PAB runs all blocks at every step, whatever number it is asked for."""
    rows = [
        {"method": "pab", "label": "pab @10", "schedule": "own: 10 steps", "full_steps": 50.0},
        {"method": "fora", "label": "fora @10", "schedule": "own: 0", "full_steps": 10},
        {"method": "speca", "label": "speca @10", "schedule": "own: 10 steps", "full_steps": 11.3},
    ]
    rows = [{**row, "psnr_mean": 40.0 - n} for n, row in enumerate(rows)]
    assert [row["method"] for row in opponents(rows, 10)] == ["fora", "speca"]
    (row,) = rows[1:2]
    few = [{**row, "label": f"fora @{n}", "full_steps": n} for n in (4, 3, 2)]
    assert [r["full_steps"] for n in (4, 3, 2, 1) for r in opponents(few, n)] == [4, 3, 2]
    assert opponents(few[:2], 2) == []  # three full steps are half as much work again


def test_a_bound_is_drawn_as_a_line_of_its_own(contest):
    rows = [{**contest.rows[0], "limit": dB, "seconds": s} for dB, s in ((95.0, 2.0), (90.0, 1.0))]
    (bound,) = _limit(rows, "seconds").values()
    assert bound == [(1.0, 90.0), (2.0, 95.0)]
    assert _limit(contest.rows, "seconds") == {}
    drawn = []
    with mock.patch("lesa.evaluation.charts.figure_png", drawn.append):
        quality_png(rows, extra={"least-squares bound": [(4, 90.0), (8, 95.0)]})
    (figure,) = drawn
    (legend,) = figure.legends
    assert "least-squares bound" in [text.get_text() for text in legend.get_texts()]
    lines = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    assert [[4, 90], [8, 95]] in lines


def test_peak_memory_is_what_cuda_allocated_on_top(monkeypatch):
    """No GPU needed: the allocator's own counters are played."""
    import types

    from lesa.evaluation.metrics_row import MetricsRow
    from lesa.evaluation.runner import _peak_memory

    peaks = iter((900, 700))
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 400)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: next(peaks))
    measured, pipe = MetricsRow(), types.SimpleNamespace(_execution_device="cuda:0")
    for _ in range(2):
        with _peak_memory(pipe, measured):
            pass
    assert measured.peak_bytes == 500
    with _peak_memory(types.SimpleNamespace(_execution_device="cpu"), cpu := MetricsRow()):
        pass
    assert cpu.peak_bytes is None


def test_report_json_is_strict(comparison, tmp_path):
    path = write_report(comparison, tmp_path)["report.json"]

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    facts = json.loads(path.read_text(), parse_constant=refuse)
    assert facts["rows"][-1]["psnr_mean"] is None  # infinite
    assert facts["prompts"] == PROMPTS and facts["seed"] == 7
    assert {"python", "torch", "lesa"} <= set(facts["versions"])


def test_terminal_table_fits_80_columns(comparison):
    from rich.console import Console

    console = Console(width=80, record=True, quiet=True)
    long = {**comparison.rows[0], "method": "dbcache-scm-taylor", "schedule": "searched: 0"}
    long |= {"cache_bytes": 1023.4 * 2**20, "seconds": 1234.5, "speedup": 12.34}
    with console.capture() as captured:
        console.quiet = False
        console.print(rich_table([*comparison.rows, long], comparison.plain_seconds, STEPS))
    text = captured.get()
    assert "taylor-1" in text and "…" not in text
    assert text.split("method")[1].split()[:7] == [
        "full", "seconds", "speed-up", "mean", "p10", "min", "cache",
    ]  # fmt: skip
    row = comparison.rows[2]
    (line,) = (line.split() for line in text.splitlines() if line.split()[:1] == ["taylor-1"])
    assert line[4:7] == [f"{row[key]:.1f}" for key in ("psnr_mean", "psnr_p10", "psnr_min")]


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
