"""report.html in a browser: no sideways scrolling, on a desk and in a hand."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
from evaluation.test_page import HOSTILE, made_up

from lesa.evaluation.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--virtual-time-budget=4000",
)  # fmt: skip
MEASURE = """
for (const closed of document.querySelectorAll("details")) closed.open = true;
const root = document.documentElement;
tell([root.scrollWidth, root.clientWidth]);
"""
SLIDE = """
const slider = document.querySelector(".slider"), after = slider.querySelector(".after");
const input = slider.querySelector("input"), pair = slider.querySelector(".pair");
const edge = () => Math.round(parseFloat(getComputedStyle(after).clipPath.split(" ")[3]));
input.value = 20;
input.dispatchEvent(new Event("input"));
const by_key = edge(), box = pair.getBoundingClientRect();
const touch = { clientX: box.left + 0.7 * box.width, buttons: 1, pointerType: "touch" };
pair.dispatchEvent(new PointerEvent("pointerdown", touch));
const before = after.src;
document.querySelector('.choice input[value="3"]').click();
const cell = document.getElementById("cell-3-" + slider.dataset.column).querySelector("img");
tell([by_key, edge(), before !== after.src, after.src === cell.src, after.alt === cell.alt]);
"""
SCRIPT = """<script>
const tell = (found) => parent.postMessage(JSON.stringify(found), "*");
addEventListener("load", () => {{ {} }});
</script>"""
FRAME = """<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe>
<script>addEventListener("message", (event) => document.title = "told " + event.data)</script>
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed"),
]


@pytest.mark.parametrize("kind", ["pictures", "videos", "hostile", "many columns"])
def test_the_page_is_no_wider_than_the_window(kind, tmp_path):
    found = made_up(HOSTILE if kind == "hostile" else None, video=kind == "videos", judged=True)
    if kind == "many columns":
        score = {"value": 0.123, "low": 0.111, "high": 0.222}
        for row in found.rows:
            row["scores"] = {f"a long score {n}": score for n in range(8)}
        found.plain_more["scores"] = found.rows[0]["scores"]
    write_report(found, tmp_path)
    for width in (400, 1000, 1280):
        held, seen = told(tmp_path, MEASURE, width)
        assert held <= seen and width - 20 <= seen <= width  # but for a scroll bar


def test_the_slider_follows_keys_and_fingers_and_takes_another_row(tmp_path):
    write_report(made_up(), tmp_path)
    assert told(tmp_path, SLIDE, 400) == [20, 70, True, True, True]


def test_letters_of_charts_are_large_enough_in_a_narrow_window(tmp_path):
    """The smallest are 8.5 points, of which 104 pixels of a picture are an inch at full size."""
    write_report(made_up(), tmp_path)
    widths = """tell([...document.querySelectorAll(".chart img")].map(
      (img) => img.clientWidth / parseFloat(img.style.getPropertyValue("--natural"))));"""
    scales = told(tmp_path, widths, 400)
    assert scales and all(8.5 / 72 * 104 * scale > 10 for scale in scales)


def told(folder, script, width):
    """What a script tells of the report in a frame of this width."""
    page, frame = (folder / "report.html").read_text(encoding="utf-8"), folder / "frame.html"
    changed = page.replace("</html>", SCRIPT.format(script))
    (folder / "page.html").write_text(changed, encoding="utf-8")
    frame.write_text(FRAME.format(width=width))
    own = f"--user-data-dir={folder / 'browser'}"
    command = [BROWSER, *FLAGS, own, "--window-size=1400,1000", "--dump-dom", frame.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r"<title>told (.*)</title>", dom)
    assert found, dom[:500]
    return json.loads(html.unescape(found[1]))
