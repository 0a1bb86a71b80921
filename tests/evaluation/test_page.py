"""report.html and its figures, of comparisons that are made up here: instant, no pipeline."""

from __future__ import annotations

import base64
import json
import random
from html.parser import HTMLParser
from io import BytesIO
from unittest import mock

import pytest
import torch
from PIL import Image

from lesa.errors import LesaError
from lesa.evaluation.charts import errors_png
from lesa.evaluation.compare import PLAIN, Comparison, Worst
from lesa.evaluation.method import Method
from lesa.evaluation.metrics_row import MetricsRow
from lesa.evaluation.page import html
from lesa.evaluation.pictures import data_uri
from lesa.evaluation.printable import printable
from lesa.evaluation.ranking import duels
from lesa.evaluation.report import require_extra, write_report
from lesa.evaluation.views import in_grid, sentence

STEPS = 20
LISTS = {5: [0, 4, 9, 13, 18], 4: [0, 5, 11, 17]}
MEANS = {"lesa": (52.0, 47.0), "fora": (38.0, 37.0), "taylor-1": (36.0, 22.0)}
HOSTILE = [
    "50% off $x^$ sale, \\frac{",
    "<script>alert('&amp;')</script>\" onload=\"x",
    "two\nlines\tand\r\na tab",
    "猫 🐈‍⬛ с котом",
    "a lone \udc80 surrogate",
    "\u202eright to left\u202c שלום مرحبا",
    "escape \x1b[31m and \x00 zero",
    "very long " * 20_000,
]


def made_up(prompts=None, means=MEANS, video=False, judged=False):
    """Rows, curves and pictures of three methods at two counts, and the worst prompts of lesa."""
    prompts = prompts or [f"prompt {n}" for n in range(4)]
    draw = random.Random(0)
    shape = (len(prompts), *((6,) if video else ()), 3, 16, 16)
    settings = {"num_inference_steps": STEPS, "prompt_embeds": torch.zeros(2, 3)}
    found = Comparison(prompts, settings, titles=prompts, plain_seconds=4.0, plain_tflops=2.0)
    found.pictures[PLAIN] = torch.rand(shape)
    found.noise_levels = [1 - n / STEPS for n in range(STEPS + 1)]
    for count, full in LISTS.items():
        for method, values in means.items():
            mean = values[list(LISTS).index(count)]
            psnr = sorted(mean + draw.uniform(-1, 1) for _ in prompts)
            label = f"{method} @{count}"
            row = {
                "method": method, "label": label, "psnr": psnr,
                "schedule": f"{'searched' if method == 'lesa' else 'own'}: steps",
                "full_steps": count, "full_step_list": full,
                "psnr_mean": mean, "psnr_p10": mean - 1, "psnr_min": psnr[0],
                "psnr_mean_interval": [mean - 1, mean + 1], "psnr_p10_interval": [mean - 2, mean],
                "ssim_mean": 0.99, "seconds": 1.0, "speedup": STEPS / count, "tflops": 0.5,
                "cache_bytes": 2048,
            }  # fmt: skip
            if judged:
                row |= {"lpips_mean": 0.0123, "lpips_max": 0.0456}
            found.rows.append(row)
            found.pictures[label] = torch.rand(shape)
            found.curves[label] = [0.0, *(draw.uniform(0.01, 0.1) for _ in range(STEPS - 1))]
    for count in LISTS if "lesa" in means else ():
        shown = {PLAIN: found.pictures[PLAIN]}
        shown |= {label: found.pictures[label] for label in (f"lesa @{count}", f"fora @{count}")}
        decibels = {f"lesa @{count}": [40.0] * 9, f"fora @{count}": [30.0] * 9}
        found.worst.append(Worst(f"lesa @{count}", prompts, decibels, shown))
    return found


def page_of(comparison):
    """The page without charts, which take seconds."""
    return html(comparison, duels(comparison.rows), "title", {})


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag, **wanted):
        found = (attrs for name, attrs in self.tags if name == tag)
        return [a for a in found if all((a.get(k) or "") == v for k, v in wanted.items())]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    comparison = made_up()
    files = write_report(comparison, tmp_path_factory.mktemp("report"), title="of a test")
    assert comparison.notes == []
    return files


@pytest.fixture(scope="module")
def text(written):
    return written["report.html"].read_text(encoding="utf-8")


def test_the_sentence_and_the_pictures_come_first_and_the_big_table_last(text):
    parts = (
        "<h1>The same pictures, 4.0 times faster</h1>", 'class="grid', "Plain against accelerated",
        "Full and skipped steps", "lesa and the best peers", "Quality against work",
        "Error per step", "Where lesa is worst", "All methods", '<table class="all">',
    )  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert text.rindex("<table") == places[-1]


def test_every_picture_has_words_and_lies_in_the_page(text):
    images = Page(text).all("img")
    assert len(images) > 40
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in images)
    assert any(image["alt"] == "lesa, 5 full steps: prompt 2" for image in images)
    assert "http" not in text and "url(" not in text and "@import" not in text


def test_the_grid_shows_the_best_peer_of_each_count():
    rows = made_up(means={**MEANS, "taylor-1": (39.0, 22.0)}).rows
    assert in_grid(rows) == ["lesa @5", "taylor-1 @5", "lesa @4", "fora @4"]
    borrowed = {**rows[2], "schedule": "searched: steps", "label": "b @5", "psnr_mean": 45.0}
    assert in_grid([*rows, borrowed])[:2] == ["lesa @5", "taylor-1 @5"]
    peers = [row for row in rows if row["method"] != "lesa"]
    assert in_grid(peers) == [row["label"] for row in peers]
    assert in_grid(rows, ("fora",)) == ["fora @5", "fora @4"]


@pytest.mark.parametrize(
    ("mean", "video", "gain"),
    [
        (50.0, False, "The same pictures, 4.0 times faster"),
        (50.0, True, "The same videos, 4.0 times faster"),
        (39.9, False, "Nearly the same pictures, 4.0 times faster"),
        (25.0, False, "Similar pictures, 4.0 times faster"),
    ],
)
def test_the_sentence_claims_what_was_measured(mean, video, gain):
    found = made_up(means={"lesa": (mean, mean - 5), "fora": (38.0, 30.0)}, video=video)
    told = sentence(found)
    assert told["gain"] == gain
    row = found.rows[0]
    for key in ("psnr_mean", "psnr_p10", "psnr_min"):
        assert f"{row[key]:.1f} dB" in told["numbers"]
    assert (
        "5 of 20 steps in full" in told["numbers"] and "fora with 5, has 38.0 dB" in told["numbers"]
    )


def test_a_slower_run_is_not_called_faster_nor_peers_lesa():
    found = made_up()
    for row in found.rows:
        row["speedup"] = 0.9
    assert sentence(found)["gain"] == "The same pictures, no faster"
    peers = sentence(made_up(means={"fora": (38.0, 37.0)}))
    assert peers["gain"] == "fora is closest to the plain run"
    assert "5 of 20 steps in full" in peers["numbers"] and "4.0 times faster" in peers["numbers"]


def test_pictures_that_hold_no_numbers_are_not_called_identical(tmp_path):
    found = made_up()
    for row in found.rows[:2]:
        row["psnr"] = [float("nan")] * 4
        row |= dict.fromkeys(("psnr_mean", "psnr_p10", "psnr_min"), float("nan"))
        found.pictures[row["label"]][:] = float("nan")
    found.rows[3]["psnr_mean"] = float("nan")
    assert sentence(found)["gain"] == "Unusable pictures, 4.0 times faster"
    page = write_report(found, tmp_path)["report.html"].read_text()
    assert found.notes == [] and "identical" not in page


def test_a_slider_lays_any_shown_row_over_the_plain_run(text):
    page = Page(text)
    (*_, first) = page.all("input", type="range")
    assert first["aria-label"].startswith("Share of the plain picture: prompt")
    lines = page.all("input", type="radio")
    assert [line["value"] for line in lines] == ["1", "2", "3", "4"]
    assert ["checked" in line for line in lines] == [True, False, False, False]
    pictures = {tag.get("id") for tag in page.all("figure")}
    for slider in page.all("figure", **{"class": "slider"}):  # where the script takes others from
        assert {f"cell-{line}-{slider['data-column']}" for line in range(5)} <= pictures


def test_a_video_is_divided_in_every_frame_that_is_shown():
    page = Page(page_of(made_up(video=True)))
    pairs, sliders = page.all("div", **{"class": "pair"}), page.all("input", type="range")
    assert len(pairs) == 5 * len(sliders) > 0
    assert any(image["alt"].startswith("frame 5, lesa, 5 full") for image in page.all("img"))


def test_steps_tell_what_they_are_and_the_noise_level(text):
    page = Page(text)
    full = page.all("rect", **{"class": "full"})
    assert len(full) == 2 * (5 + 4)  # lesa and its best peer at each count
    assert len(page.all("rect")) == 4 * STEPS
    assert [float(step["x"]) for step in full[:5]] == pytest.approx([n + 0.06 for n in LISTS[5]])
    for told in ("step 4, noise level 0.800: in full", "step 5, noise level 0.750: skipped"):
        assert any(part.startswith(told) for part in page.texts)
    label = page.all("svg")[0]["aria-label"]
    assert label == "lesa, 5 full steps of 20 steps: 0, 4, 9, 13, 18"


def test_markers_of_the_error_stand_on_the_full_steps():
    found = made_up()
    adaptive = {key: value for key, value in found.rows[1].items() if key != "full_step_list"}
    found.rows[1] = adaptive
    drawn = []
    with mock.patch("lesa.evaluation.charts.figure_png", drawn.append):
        errors_png(found.curves, found.rows)
    marked = {}
    for line in drawn[0].axes[0].lines:
        marked[line.get_color()] = [line.get_xdata()[place] for place in line.get_markevery()]
    assert marked["#c1121f"] == LISTS[5][1:]  # at step 0 there is no error to draw
    assert [STEPS - 1] in [marked[colour] for colour in marked]  # chosen anew for each prompt


def test_lpips_stands_beside_psnr_where_it_was_measured(text):
    assert "LPIPS" not in text
    told = page_of(made_up(judged=True))
    table = told[told.index('<table class="all">') :]
    assert "<th>min</th><th>LPIPS mean</th><th>LPIPS max</th>" in table
    assert "0.0123" in table and "0.0456" in table


def test_lpips_makes_columns_of_its_own_and_is_no_share():
    measured = MetricsRow(
        psnr=[30.0, 40.0], ssim=[0.9, 0.9], seconds=[1.0], speedup=[2.0], cpu_seconds=[1.0]
    )
    plain = MetricsRow(judged={"lpips": [0.0, 0.0], "shape": [1.0, 1.0]})
    measured.judged = {"lpips": [0.1, 0.3], "shape": [1.0, 0.0]}
    row = measured.row(Method("fora", STEPS), plain)
    assert row["lpips_mean"] == pytest.approx(0.2) and row["lpips_max"] == 0.3
    low, high = row["lpips_mean_interval"]
    assert 0.1 <= low <= 0.2 <= high <= 0.3
    assert list(row["scores"]) == ["shape"]
    del measured.judged["shape"]
    assert "scores" not in measured.row(Method("fora", STEPS), plain)


@pytest.mark.parametrize(
    ("shape", "kind", "mode", "size"),
    [
        ((3, 64, 32), "PNG", "RGB", (32, 64)),
        ((1, 64, 32), "PNG", "L", (32, 64)),
        ((4, 64, 32), "PNG", "RGBA", (32, 64)),
        ((3, 300, 300), "JPEG", "RGB", (300, 300)),
        ((4, 2048, 1024), "JPEG", "RGB", (256, 512)),
    ],
)
def test_pictures_in_a_page_are_exact_while_they_are_small(shape, kind, mode, size):
    picture = torch.rand(shape)
    picture[:, 0, 0] = float("nan")
    head, _, data = data_uri(picture).partition(",")
    image = Image.open(BytesIO(base64.b64decode(data)))
    assert head == f"data:image/{kind.lower()};base64"
    assert (image.format, image.mode, image.size) == (kind, mode, size)
    if kind == "PNG":
        first = image.getpixel((1, 1))
        expected = (255 * picture[:, 1, 1]).round().int().tolist()
        assert list(first if isinstance(first, tuple) else (first,)) == expected


def test_prompts_are_plain_text_everywhere(tmp_path):
    found = made_up(HOSTILE)
    files = write_report(found, tmp_path)
    assert found.notes == []  # no figure failed
    assert json.loads(files["report.json"].read_bytes())["prompts"] == HOSTILE
    page = Page(files["report.html"].read_text(encoding="utf-8"))
    assert len(page.all("script")) == 1 and not any("onload" in a for _, a in page.tags)
    shown = "".join(page.texts)
    for prompt in HOSTILE[:2]:
        assert prompt in shown
    assert "\udc80" not in shown and "\x1b" not in shown and "\x00" not in shown


def test_printable_is_one_line_of_characters_that_can_be_shown():
    assert printable("a\nb\tc \x1b\udc80") == "a b c \ufffd\ufffd"
    assert printable("abcdef", 4) == "abc…" and printable("abcd", 4) == "abcd"


def test_a_figure_that_fails_is_a_note_and_numbers_come_first(tmp_path, monkeypatch):
    seen = []

    def fails(*_):
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        raise ValueError("too wide\nby far")

    monkeypatch.setattr("lesa.evaluation.report.errors_png", fails)
    monkeypatch.setattr("lesa.evaluation.page.grid", fails)
    found = made_up()
    files = write_report(found, tmp_path)
    assert "report.json" in seen[0]
    assert "error-per-step.png" not in files and "grid.png" in files
    expected = [
        "error-per-step.png was not made: ValueError: too wide",
        "the grid of the page was not made: ValueError: too wide",
    ]
    assert found.notes == expected
    facts = json.loads(files["report.json"].read_text())
    assert facts["notes"] == expected
    assert facts["settings"]["prompt_embeds"] == "Tensor (2, 3)"
    assert expected[0] in files["report.html"].read_text()


@pytest.mark.parametrize("module", ["matplotlib.figure", "jinja2"])
def test_without_the_extra_the_numbers_are_kept(module, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(LesaError, match=r"^report: .* is not installed .*; run pip install"):
        require_extra()
    with pytest.raises(LesaError, match="is not installed"):
        write_report(made_up(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
