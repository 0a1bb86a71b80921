"""Ctrl-C: a real SIGINT to a real process, and what is on disk afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from lesa import LesaForecaster, testbed
from lesa.cli import app
from lesa.training import Statistics

STEPS = ("--num-inference-steps", "8")
pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="there, Ctrl-C goes to a whole console"
)


def interrupt(args, ready, tmp_path) -> subprocess.CompletedProcess:
    """Run a command, send Ctrl-C once `ready()` holds, and wait for its end."""
    with open(tmp_path / "err", "w+") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "lesa", *map(str, args)],
            stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            # Tests that were started in the background would pass on that Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        deadline = time.monotonic() + 300  # a busy machine needs a minute to import torch
        while not ready() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        reached = ready()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        stderr.seek(0)
        assert reached, f"the command never got that far: {stderr.read()}"
        return subprocess.CompletedProcess(args, process.returncode, out, stderr.read())


def test_ctrl_c_while_generating_keeps_what_is_finished(tmp_path):
    texts, out = tmp_path / "p.txt", tmp_path / "out"
    texts.write_text("\n".join(testbed.captions(200, seed=2)))
    args = ("generate", "testbed", "--prompts", texts, "--out", out, "--batch-size", "1", *STEPS)
    done = interrupt(args, lambda: out.exists() and len(list(out.glob("*.png"))) >= 2, tmp_path)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr and "Traceback" not in done.stderr
    pictures = sorted(out.glob("*.png"))
    assert 2 <= len(pictures) < 200
    for path in pictures:  # complete ones, under their final names only
        Image.open(path).load()
    assert {path.suffix for path in out.iterdir()} == {".png", ".jsonl"}
    lines = map(json.loads, (out / "manifest.jsonl").read_text().splitlines())
    noted = [line["file"] for line in lines]
    assert noted == [path.name for path in pictures][: len(noted)] and noted


def test_ctrl_c_while_collecting_is_taken_up_again(tmp_path):
    texts, out = tmp_path / "p.txt", tmp_path / "out"
    texts.write_text("\n".join(testbed.captions(200, seed=2, split="train")))
    args = ("train", "testbed", "--prompts", texts, "--out", out, "--batch-size", "1", *STEPS,
            "--full-steps", "3")  # fmt: skip
    done = interrupt(args, lambda: any(out.glob("statistics-*")), tmp_path)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr and "Traceback" not in done.stderr
    assert not (out / "config.json").exists()
    (kept,) = out.iterdir()
    assert 1 <= len(Statistics.load(kept).prompts) < 200


def test_ctrl_c_after_the_first_fit_saves_what_was_found(tmp_path):
    """The first number of full steps is complete, the others are as the plain runs alone say."""
    texts, out, told = tmp_path / "p.txt", tmp_path / "out", tmp_path / "err"
    texts.write_text("\n".join(testbed.captions(8, seed=2, split="train")))
    args = ("train", "testbed", "--prompts", texts, "--out", out, *STEPS, "--form", "table",
            "--full-steps", "4,3,2", "--polish", "0")  # fmt: skip
    done = interrupt(args, lambda: "fitted: 4 of 8" in told.read_text(), tmp_path)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr and "fitted: 2 of 8" not in done.stderr
    assert done.stderr.splitlines()[-1] == "lesa: interrupted; what was finished is kept"
    assert f"forecaster in {out}" in done.stdout.splitlines()
    kept = LesaForecaster.from_pretrained(out)
    assert sorted(len(plan.full_steps) for plan in kept.calibrated) == [2, 3, 4]
    worth = {len(entry.schedule.full_steps): entry.worth for entry in kept.calibrations}
    assert worth[4].pictures >= 2 and worth[2] is None
    result = CliRunner().invoke(app, ["inspect", str(out), "--json"])
    assert json.loads(result.stdout)["metadata"]["interrupted"] is True
