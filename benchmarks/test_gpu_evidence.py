"""The evidence command, on the CPU: its parts in their tiny forms, its limits, its summary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_evidence
import pytest
import torch
from gpu_evidence import Part

SCRIPT = Path(gpu_evidence.__file__)


def shell(name: str, code: str, seconds: float = 5.0) -> Part:
    command = [sys.executable, "-c", code]
    return Part(name, seconds, command, command)


@pytest.fixture
def evidence(monkeypatch, tmp_path):
    """Runs the command with other parts; returns its exit status and rows by name."""

    def go(*parts, seconds=60.0):
        monkeypatch.setattr(gpu_evidence, "parts", lambda out: list(parts))
        arguments = ["gpu_evidence.py", "--dry", "--out", str(tmp_path), "--seconds", str(seconds)]
        monkeypatch.setattr(sys, "argv", arguments)
        status = gpu_evidence.main()
        rows = json.loads((tmp_path / "summary.json").read_text())["parts"]
        return status, {row["name"]: row for row in rows}

    return go


def test_a_part_that_fails_or_hangs_stops_nothing(evidence, tmp_path):
    child = tmp_path / "child"
    hang = (
        "import subprocess, sys, time; "
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    status, rows = evidence(
        shell("bad", "print('before'); raise SystemExit('a reason')"),
        shell("hangs", hang, 1.0),
        shell("good", "print('done')", 3.0),
        Part("gpu", 1.0, ["true"], None),
        Part("tool", 1.0, ["x"], ["x"], needs="no-such-program"),
        seconds=11.0,
    )
    found = {name: row["status"] for name, row in rows.items()}
    assert found == {
        "bad": "failed",
        "hangs": "timeout",
        "good": "ok",
        "gpu": "skipped: no device",
        "tool": "left out",
    }
    assert status == 1 and "a reason" in rows["bad"]["tail"] and "done" in rows["good"]["tail"]
    assert rows["tool"]["tail"] == "no-such-program is not on PATH"
    assert "done" in (tmp_path / "log.txt").read_text()
    deadline = time.monotonic() + 5
    while _alive(int(child.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(int(child.read_text()))


def _alive(pid: int) -> bool:
    """Neither gone nor waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_no_longer_fits_is_listed(evidence):
    status, rows = evidence(
        shell("long", "import time; time.sleep(9)", 2.0),
        shell("next", "import time; time.sleep(9)", 1.0),
        shell("first ends", "pass", 0.1),
        seconds=3.1,
    )
    assert rows["long"]["status"] == "timeout" and 1.5 < rows["long"]["seconds"] < 4
    assert rows["next"]["status"] == "timeout" and status == 1


def test_saved_time_goes_to_later_parts(evidence):
    _, rows = evidence(
        shell("short", "pass", 3.0), shell("long", "import time; time.sleep(2)", 1.0), seconds=4.0
    )
    assert rows["long"]["status"] == "ok"


def dry_run(folder: Path, *names: str) -> tuple[int, dict[str, dict]]:
    """The exit status of some parts in their tiny forms, and their rows by name."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry", "--out", str(folder), "--seconds", "900",
         "--parts", *names],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    rows = json.loads((folder / "summary.json").read_text())["parts"]
    return done.returncode, {row["name"]: row for row in rows}


HALVES = {
    "kernels and tests": ("smoke", "kernel tests", "CUDA tests", "tune", "kernels"),
    "steps and loops": ("skipped step", "FLUX.1-dev loop", "other loops", "ncu"),
}


def test_the_halves_are_all_parts(tmp_path):
    names = [part.name for part in gpu_evidence.parts(tmp_path)]
    assert [name for half in HALVES.values() for name in half] == names


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
@pytest.mark.parametrize("half", HALVES)
def test_every_part_runs_in_a_tiny_form(half, tmp_path):
    """What has no tiny form says that it needs a device. Within 90 seconds on an idle CPU."""
    status, rows = dry_run(tmp_path, *HALVES[half])
    assert status == 0, {n: r["tail"] for n, r in rows.items() if r["status"] == "failed"}
    assert [*rows] == [*HALVES[half]]
    assert {row["status"] for row in rows.values()} <= {"ok", "skipped: no device", "left out"}
    others = [name for name, row in rows.items() if row["status"] != "ok"]
    assert others in ([], ["ncu"]) or torch.cuda.is_available()
    assert {path.name for path in tmp_path.iterdir()} <= {
        "summary.json", "log.txt", "junit.xml", "kernels.json", "skipped_step.json", "loop.json",
        "ncu.csv", "interpreter.json",
    }  # fmt: skip
    if half == "steps and loops":
        models = json.loads((tmp_path / "loop.json").read_text())["models"]
        assert [row["model"] for row in models] == ["flux.1-dev", "hunyuan-video", "qwen-image"]


def test_without_a_gpu_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_evidence.py", "--out", str(tmp_path / "new")])
    assert gpu_evidence.main() == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err and not (tmp_path / "new").exists()
