"""report.html in a browser: no sideways scrolling, on a desk and in a hand."""

from __future__ import annotations

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
MEASURE = """<script>
addEventListener("load", () => {
  for (const closed of document.querySelectorAll("details")) closed.open = true;
  const root = document.documentElement;
  parent.postMessage([root.scrollWidth, root.clientWidth].join(" of "), "*");
});
</script>"""
FRAME = """<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe>
<script>addEventListener("message", (event) => document.title = "measured " + event.data)</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium and no google-chrome on the PATH")
@pytest.mark.parametrize("kind", ["pictures", "videos", "hostile", "many columns"])
def test_the_page_is_no_wider_than_the_window(kind, tmp_path):
    found = made_up(HOSTILE if kind == "hostile" else None, video=kind == "videos", judged=True)
    if kind == "many columns":
        score = {"value": 0.123, "low": 0.111, "high": 0.222}
        for row in found.rows:
            row["scores"] = {f"a long score {n}": score for n in range(8)}
        found.plain_more["scores"] = found.rows[0]["scores"]
    page = write_report(found, tmp_path)["report.html"].read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(page.replace("</html>", MEASURE), encoding="utf-8")
    for width in (400, 1000, 1280):
        held, seen = _measured(tmp_path, width)
        assert held <= seen and width - 20 <= seen <= width  # but for a scroll bar


def _measured(folder, width) -> tuple[int, int]:
    """Width of what the page holds, and of what is seen of it."""
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(width=width))
    own = f"--user-data-dir={folder / 'browser'}"
    command = [BROWSER, *FLAGS, own, "--window-size=1400,1000", "--dump-dom", frame.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r"<title>measured (\d+) of (\d+)", dom)
    assert found, dom[:500]
    return int(found[1]), int(found[2])
