"""`lesa play` in a real Chromium, driven by Playwright: what a person does and sees.

`LESA_CHROMIUM` names a browser, else the system's Chromium or Chrome is taken, else Playwright's.
With `LESA_PLAY_SCREENSHOT=docs/images/play.png` the picture of docs/play.md is made anew.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the extra play is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WAIT = 120_000  # ms; the machine may be busy
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FINISHED = "document.querySelector('#numbers')?.innerText.includes('dB')"
RUNNING = "document.querySelector('#numbers')?.innerText.includes('running')"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    named = os.environ.get("LESA_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as driver:
        path = named or driver.chromium.executable_path
        if not os.path.exists(path):
            pytest.skip("no Chromium here: install one, or name it by LESA_CHROMIUM")
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Iterator[dict[str, Any]]:
    """What `lesa play testbed` told, and its process; it must end well on Ctrl-C."""
    words = ["play", "testbed", "--port", "0", "--json", "-"]
    temporary = tmp_path_factory.mktemp("temporary")
    process = subprocess.Popen(
        [sys.executable, "-m", "lesa", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)},
    )  # fmt: skip
    text = ""
    while not text.endswith("}\n"):
        line = process.stdout.readline()
        assert line, "it ended before it served"
        text += line
    yield json.loads(text) | {"process": process}
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert not list(temporary.glob("lesa-play-*"))


@pytest.fixture
def tab(browser, command) -> Iterator[Any]:
    """A tab with the page, which asks no other server for anything."""
    yield from opened_tab(browser, command["url"])


def opened_tab(browser: Any, url: str) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page, asked = context.new_page(), []
    page.set_default_timeout(WAIT)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.wait_for_selector("#generate")
    yield page
    assert not [at for at in asked if not at.startswith((url, "data:", "blob:"))]
    context.close()


def ask(page: Any, prompt: str, seed: int) -> None:
    page.fill("#prompt textarea", prompt)
    page.fill("#seed input", str(seed))
    page.click("#generate")


def finished(page: Any) -> dict[str, str]:
    """The numbers by their names, once all is there."""
    page.wait_for_function(FINISHED)
    cells = page.locator("#numbers .lesa-numbers div").all()
    return {cell.locator("span").inner_text(): cell.locator("b").inner_text() for cell in cells}


def images(page: Any, part: str) -> list[str]:
    return [image.get_attribute("src") for image in page.locator(f"{part} img").all()]


def test_a_picture_a_comparison_and_another_count(tab):
    """All that the page promises; the accelerated picture is there before the plain one."""
    start = time.perf_counter()
    tab.click("#generate")
    tab.wait_for_selector("#fast img")
    first = time.perf_counter() - start
    tab.wait_for_function(RUNNING)
    assert not images(tab, "#errors") and not images(tab, "#both")
    numbers = finished(tab)
    print(f"first picture after {first:.2f} s, all after {time.perf_counter() - start:.2f} s")
    assert float(numbers["faster"].rstrip("x")) > 1 and numbers["plain"].endswith(" s")
    assert float(numbers["PSNR"].removesuffix(" dB")) > 30
    tab.wait_for_selector("#both img")
    assert [len(images(tab, part)) for part in ("#plain", "#errors", "#both")] == [1, 1, 2]
    assert tab.locator("#strip i").count() == 50 and tab.locator("#strip i.full").count() == 10
    if target := os.environ.get("LESA_PLAY_SCREENSHOT"):
        tab.wait_for_timeout(1000)  # the border of what runs fades
        tab.screenshot(path=ROOT / target, full_page=True)
    plain, seconds = images(tab, "#plain"), numbers["plain"]
    slider = tab.locator("#full-steps input[type=range]")
    slider.focus()
    box = slider.bounding_box()
    tab.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] / 2)
    tab.wait_for_function("document.querySelectorAll('#strip i.full').length > 20")
    after = finished(tab)
    assert images(tab, "#plain") == plain and after["plain"] == seconds  # did not run again
    assert float(after["PSNR"].removesuffix(" dB")) > float(numbers["PSNR"].removesuffix(" dB"))


def test_a_mistake_is_told_and_the_page_goes_on(tab):
    ask(tab, "  ", 1)
    tab.wait_for_selector("[data-testid=toast-body]")
    assert "prompt='': it is empty" in tab.inner_text("[data-testid=toast-body]")
    ask(tab, "a large red circle on a white background", 1)
    assert "PSNR" in finished(tab)


def test_two_tabs_at_once_do_not_mix(browser, command):
    """Each shows what it would have shown alone."""
    first, second = (opened_tab(browser, command["url"]) for _ in range(2))
    one, other = next(first), next(second)
    texts = (
        "a large red circle on a white background",
        "a small blue triangle on a gray background",
    )
    for page, text in zip((one, other), texts, strict=True):
        ask(page, text, 7)
    together = [finished(page)["PSNR"] for page in (one, other)]
    assert together[0] != together[1]
    for page, text, before in ((one, texts[1], together[1]), (other, texts[0], together[0])):
        page.fill("#prompt textarea", text)
        page.click("#generate")
        page.wait_for_function(f"document.querySelector('#numbers').innerText.includes('{before}')")
    for tabs in (first, second):
        assert next(tabs, None) is None
