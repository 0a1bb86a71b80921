"""The examples run, here with fewer steps and in one process; `make test-slow` runs the commands
that they show, as they are written, and the notebook."""

from __future__ import annotations

import ast
import functools
import io
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import doc_blocks
import pytest
import torch
from doc_blocks import ROOT, STAND_INS, replaced
from PIL import Image

import lesa
from lesa import testbed
from lesa.hooks import model_specs

FOLDER = ROOT / "examples"
TOUR = ("tour", "make_tour")
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in TOUR)
OWN = "own_model"  # it loads no pipeline
SMALL = {  # numbers of an example -> those of `make test`
    "full_steps=10": "full_steps=4",
    "full_steps=16": "full_steps=6",
    "full_steps=8": "full_steps=4",
    "every(6)": "every(3)",
    "50, 8": "12, 8",
    "range(1000)": "range(40)",
    "randn(2000": "randn(200",
}
STEPS, FULL = 12, 4
Run = Callable[..., tuple[dict[str, Any], str]]


def source(name: str) -> str:
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def flux() -> Any:
    return testbed.load()


@pytest.fixture
def run(flux, tmp_path, monkeypatch, capsys) -> Iterator[Run]:
    """Runs an example in a folder of its own; what it named and what it printed."""
    short = testbed.settings() | {"num_inference_steps": STEPS}
    captions = testbed.captions
    monkeypatch.setattr(testbed, "load", lambda: flux)
    monkeypatch.setattr(testbed, "settings", lambda: dict(short))
    monkeypatch.setattr(testbed, "captions", lambda count, **more: captions(min(count, 3), **more))
    train = functools.partial(lesa.train, form="table", refine=0, polish=0, progress=False)
    monkeypatch.setattr(lesa, "train", train)
    monkeypatch.setattr(model_specs, "_SPECS", model_specs.known_models())
    monkeypatch.chdir(tmp_path)

    def go(name: str) -> tuple[dict[str, Any], str]:
        space: dict[str, Any] = {"__name__": name}
        code = replaced(source(name), SMALL)
        exec(compile(code, f"{name}.py", "exec", dont_inherit=True), space)
        return space, capsys.readouterr().out

    yield go
    lesa.disable(flux)


def decibels(printed: str) -> list[float]:
    return [float(value) for value in re.findall(r"([\d.]+) dB", printed)]


def test_train_and_use(run):
    space, printed = run("train_and_use")
    stats = lesa.stats(space["pipe"])
    assert (stats.full, stats.skipped) == (FULL, STEPS - FULL) and stats.forecaster == "lesa-table"
    assert decibels(printed)[-1] > 25
    with Image.open(space["folder"] / "plain-and-fast.png") as picture:
        assert picture.size == (128, 64)


def test_own_loop(run):
    space, printed = run("own_loop")
    assert 20 < decibels(printed)[0] < 100
    with Image.open(space["file"]) as picture:
        assert picture.size == (128, 64)
    assert torch.equal(space["sample"](seed=0).cpu().float(), space["plain"])  # nothing is left


def test_server(run):
    pytest.importorskip("uvicorn")
    client = pytest.importorskip("fastapi.testclient").TestClient(run("server")[0]["app"])

    def ask(**budget: Any) -> Any:
        return client.get("/picture", params={"prompt": "a large blue square", **budget})

    bare = ask()
    with Image.open(io.BytesIO(bare.content)) as picture:
        assert (bare.status_code, picture.format, picture.size) == (200, "PNG", (64, 64))
    assert bare.headers["X-Full-Steps"] == f"{FULL}"
    assert ask(full_steps=6).headers["X-Full-Steps"] == "6"
    assert ask(target_speedup=6).headers["X-Full-Steps"] == "2"
    assert ask(seed=1).content != bare.content == ask(seed=0).content
    for budget in ({"full_steps": 99}, {"quality": "superb"}, {"full_steps": 2, "quality": "fast"}):
        refused = ask(**budget)
        assert refused.status_code == 422 and [*budget][0] in refused.json()["detail"]
    metrics = client.get("/metrics").text.splitlines()
    assert f'lesa_calls_total{{kind="full"}} {3 * FULL + 6 + 2}' in metrics


def test_batch_torchrun(run, tmp_path, monkeypatch):
    made = {}
    for processes in (1, 2):
        (tmp_path / f"{processes}").mkdir()
        monkeypatch.chdir(tmp_path / f"{processes}")
        monkeypatch.setenv("WORLD_SIZE", f"{processes}")
        for rank in range(processes):
            monkeypatch.setenv("RANK", f"{rank}")
            space, printed = run("batch_torchrun")
            assert f"process {rank} of {processes} on {space['device']}" in printed
        made[processes] = [path.read_bytes() for path in sorted(space["folder"].iterdir())]
        assert ": 0 pictures" in run("batch_torchrun")[1]  # started again
    assert len(made[1]) == 3 and made[1] == made[2]


def test_inside_cache_dit(run):
    pytest.importorskip("cache_dit")
    printed = run("inside_cache_dit")[1]
    *_, more, fewer = decibels(printed)  # after cache-dit's own
    assert more > fewer > 20


def test_own_forecaster(run):
    space, printed = run("own_forecaster")
    assert len(decibels(printed)) == 4 and min(decibels(printed)) > 20
    schedule, levels = lesa.Schedule.explicit([0, 4, 9], 12), [1 - i / 12 for i in range(13)]
    for damping, known in ((1.0, lesa.Taylor(1)), (0.0, lesa.Reuse())):
        own = space["DampedTrend"](damping).table(schedule, levels, "cond")
        step = torch.rand(2, 3)
        for skipped in (2, 7, 11):
            table = known.table(schedule, levels)
            assert torch.allclose(own.apply(step, skipped), table.apply(step, skipped))


def test_own_model(run):
    space, printed = run(OWN)
    model, ran = space["model"], []
    model.stages[0].register_forward_hook(lambda *_: ran.append(1))
    space["sample"]()
    assert len(ran) == FULL  # the hidden tap came last
    assert re.findall(r"(\w+) tap: [\d.]+ times as fast", printed) == ["output", "hidden"]
    assert (space["fast"] - space["plain"]).norm(dim=1).mean() < 1


def test_img2img(run):
    space, printed = run("img2img")
    assert f"strength 0.9: {FULL} of 11 steps" in printed
    assert f"strength 0.7: {FULL} of 9 steps" in printed
    assert min(decibels(printed)) > 20
    with Image.open(space["file"]) as picture:
        assert picture.size == (5 * 64, 64)


def test_controlnet(run):
    space, printed = run("controlnet")
    over_all, _, over_half = printed.partition("control over half")
    assert f"{FULL} calls computed, {STEPS - FULL} forecast" in over_all
    assert "computed all the same, 1: " in over_half and "computed all" not in over_all
    assert min(decibels(printed)) > 20
    without = space["generate"](controlnet_conditioning_scale=0.0)[0]
    assert not torch.allclose(without, space["generate"]()[0], atol=1e-3)  # it has an effect


@pytest.mark.parametrize("name", NAMES)
def test_what_an_example_shows(name):
    """How it is started, what to change for FLUX.1-dev, and no more than a screen or two."""
    text = source(name)
    assert len(text.splitlines()) < 60
    told = ast.get_docstring(ast.parse(text))
    assert f"examples/{name}.py" in told and commands(name)
    assert f"({name}.py)" in (FOLDER / "README.md").read_text(encoding="utf-8")
    if name == OWN:
        assert "FLUX.1-dev" in told
    else:
        called = ast.parse(instead(name), mode="eval").body
        assert hasattr(diffusers, re.match(r"\w+", ast.unparse(called))[0])


def test_the_page_of_the_examples():
    page = FOLDER / "README.md"
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        assert (FOLDER / target).exists(), target
    for block in doc_blocks.blocks_of(page):
        for words in doc_blocks.commands(block):
            doc_blocks.check_command(words, run=False)


def instead(name: str) -> str:
    """What the comment says that stands in the place of `lesa.testbed.load()`."""
    return re.search(r"(?m)^# or: (FluxPipeline.+)$", source(name))[1]


def commands(name: str) -> list[list[str]]:
    """The commands of an example's first lines that start it."""
    lines = ast.get_docstring(ast.parse(source(name))).splitlines()
    found = [shlex.split(line, comments=True) for line in lines if f"examples/{name}.py" in line]
    programs = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }
    return [
        [*programs[words[0]], *(word.replace("examples", f"{FOLDER}") for word in words[1:])]
        for words in found
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "server"])
def test_an_example_as_it_is_written(name, tmp_path):
    """In less than what two cores compute in two minutes."""
    (command,) = commands(name)
    before = os.times()
    subprocess.run(command, cwd=tmp_path, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = os.times()
    spent = after.children_user + after.children_system
    assert spent - before.children_user - before.children_system < 240


@pytest.mark.slow
def test_the_server_as_it_is_written(tmp_path):
    with socket.socket() as probe:
        if not probe.connect_ex(("127.0.0.1", 8000)):
            pytest.skip("another server listens at port 8000")
    (command,) = commands("server")
    server = subprocess.Popen(command, cwd=tmp_path)
    try:
        asked = re.findall(
            r'"127\.0\.0\.1:8000(.+)"', ast.get_docstring(ast.parse(source("server")))
        )
        picture, metrics = [answer(f"http://127.0.0.1:8000{path}", server) for path in asked]
    finally:
        server.terminate()
        server.wait(60)
    assert Image.open(io.BytesIO(picture)).size == (64, 64)
    assert b'lesa_calls_total{kind="skipped"}' in metrics


def answer(address: str, server: subprocess.Popen[bytes]) -> bytes:
    """What a server says, once it has started."""
    for _ in range(600):
        assert server.poll() is None
        try:
            with urllib.request.urlopen(address, timeout=300) as found:
                return found.read()
        except ConnectionError:
            pass
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
        time.sleep(1)
    raise AssertionError(f"no answer from {address}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in (OWN, "server")])
def test_the_pipeline_of_the_comment(name, tmp_path, monkeypatch):
    """With the line for FLUX.1-dev instead; here it loads the embedded one, in bfloat16."""
    monkeypatch.chdir(tmp_path)
    load = replaced(instead(name), STAND_INS)
    code = re.sub(r"lesa\.testbed\.load\(\)(\.to\(device\))?", lambda _: load, source(name))
    space = {"FLUX": str(testbed.folders("flux")[0]), "FluxPipeline": diffusers.FluxPipeline}
    exec(compile(code, name, "exec", dont_inherit=True), space | {"__name__": name})


def tour() -> Any:
    pytest.importorskip("nbclient")
    return runpy.run_path(str(FOLDER / "make_tour.py"))


def outputs(notebook: Any) -> list[set[str]]:
    """Of each cell the kinds of what it printed and drew."""
    return [{each.output_type for each in cell.get("outputs", ())} for cell in notebook.cells]


def test_the_notebook_is_what_its_source_says():
    """After a change of tour.py: python examples/make_tour.py."""
    made, path = tour(), FOLDER / "tour.ipynb"
    saved = made["nbformat"].read(path, as_version=4)
    made["nbformat"].validate(saved)
    assert [c.source for c in saved.cells] == [c.source for c in made["notebook"]().cells]
    code = [cell for cell in saved.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert not any("error" in kinds for kinds in outputs(saved))
    assert path.stat().st_size < 600_000
    text = path.read_text(encoding="utf-8")
    assert text.count('"image/png"') == 4 and str(ROOT) not in text and "/tmp/" not in text


@pytest.mark.slow
def test_the_notebook_runs():
    made = tour()
    saved = made["nbformat"].read(FOLDER / "tour.ipynb", as_version=4)
    assert outputs(made["executed"]()) == outputs(saved)
