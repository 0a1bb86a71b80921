"""The built site, and how it looks in a browser: it loads nothing from elsewhere and fits."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mkdocs", reason="the extra docs is not installed")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BROWSERS = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
PAGES = "index", "how-it-works", "troubleshooting", "results/flux", "reference"
LOADED = r'<(?:script|img|link rel="(?:stylesheet|icon)")[^>]+(?:src|href)="((?:https?:)?//[^"]+)"'
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """With --strict every dead link, unknown anchor and page outside the navigation is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    """Of a server of the site on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Nothing."""

    handler = functools.partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    reason = "playwright is not installed"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    path = os.environ.get("LESA_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium here: install one, or name it by LESA_CHROMIUM")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_nothing_is_loaded_from_another_host(site):
    found = {path: re.findall(LOADED, path.read_text()) for path in site.rglob("*.html")}
    assert len(found) > 40
    assert not {path.name: links for path, links in found.items() if links}


def test_links_to_other_sites_are_well_formed(site):
    """By their form alone: no network is asked."""
    pages = (path.read_text() for path in site.rglob("*.html"))
    links = {link for page in pages for link in re.findall(r'<a [^>]*href="(https?:[^"]+)"', page)}
    assert links
    assert not {x for x in links if not re.fullmatch(r"https://[\w.-]+\.[a-z]+(/[^\s<>\"]*)?", x)}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_pages_fit_and_ask_no_other_host(address, browser, scheme, width):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, errors, asked = context.new_page(), [], []
    page.on("console", lambda told: errors.append(told.text) if told.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    for name in PAGES:
        page.goto(f"{address}/{name}.html", wait_until="networkidle")
        assert page.evaluate(WIDER) <= 0, name
        broken = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
        assert page.evaluate(broken) == [], name
    context.close()
    assert not errors
    assert asked and all(url.startswith((address, "data:", "blob:")) for url in asked)


SHOWN = """[...document.querySelectorAll('img[src$=".svg"]')].map((img) =>
  [img.width / img.naturalWidth, getComputedStyle(img).filter])"""


def test_drawings_are_legible_on_a_phone_and_dark_in_the_dark_scheme(address, browser):
    """On a phone they are as large as drawn, in a frame that scrolls."""
    context = browser.new_context(viewport={"width": 400, "height": 900}, color_scheme="dark")
    page = context.new_page()
    page.goto(f"{address}/how-it-works.html", wait_until="networkidle")
    found = page.evaluate(SHOWN)
    assert len(found) == 6 and all(scale > 0.95 for scale, _ in found)
    assert all("invert" in filters for _, filters in found)
    context.close()


def test_the_search_finds_a_message(address, browser):
    """By three words of "forecaster='x': neither a folder nor a known method; ..."."""
    page = browser.new_page()
    page.goto(f"{address}/index.html")
    page.click("input[name=query]")
    page.keyboard.type("+folder +known +method")
    first = page.locator(".md-search-result__item").first  # of a page, its sections below
    first.wait_for(timeout=60_000)
    assert "Troubleshooting" in first.inner_text()
    assert "named.py" in first.inner_text()
    page.close()


PASTED = {  # a message as it is printed, and where it is raised
    "lesa: height=1000: FluxPipeline takes multiples of 16; give 992 or 1008": "cli/calls.py",
    "lesa: forecaster='taylr': neither a folder nor a known method; give the folder or Hub id"
    " ('owner/name') of a trained forecaster, or one of fora, taylor-0": "forecasters/named.py",
    "lesa: full-steps='10,,8': not a list of whole numbers; write 10 or 13,10,8": "cli/inputs.py",
    "lesa: out='a/b.yaml': cannot write into the folder (File exists); give another folder": (
        "util/files.py"
    ),
    "lesa.errors.LesaError: tap='hidden' does not go with form='disca', which forecasts what the"
    " model returns; use tap='output'": "forecasters/settings.py",
    "lesa: pipeline='nowhere': no such folder, nor embedded; give a folder saved with"
    " save_pretrained, a hub id, or testbed": "cli/saved.py",
    "lesa: full-steps=60: 60 of 50 steps is not possible; choose from 1 to num_inference_steps ="
    " 50": "core/schedule.py",
    "lesa: polish=-1: below 0; give at least 0": "cli/checks.py",
    "lesa: device='cuda': not usable here (no CUDA); give one of: cpu": "cli/inputs.py",
    "budget='soon': neither a number of plain generations nor a time; give 40 or \"90s\"": (
        "training/budget.py"
    ),
}


def test_the_search_finds_messages_that_are_pasted(address, browser):
    """The file that raises it is the first section of the first page."""
    page = browser.new_page()
    for message, file in PASTED.items():
        page.goto(f"{address}/index.html")
        page.click("input[name=query]")
        page.fill("input[name=query]", message)
        page.keyboard.press("End")  # the search listens to keys
        first = page.locator(".md-search-result__item").first
        first.wait_for(timeout=60_000)
        sections = first.locator("h1, h2").all_inner_texts()
        assert sections[0] == "Troubleshooting" and file in sections[1], (message, sections)
    page.close()
