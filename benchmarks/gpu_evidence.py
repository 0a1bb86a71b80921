"""Everything that only a GPU can tell, in eight minutes: `python benchmarks/gpu_evidence.py`.

Runs the parts below one after the other, each in a process group of its own with a time limit.
A part that fails or hangs never stops the next, and time that one saves goes to those after it.
Writes into --out: summary.json (rewritten after every part), log.txt, junit.xml, and what the parts
themselves write: the tuned configurations, kernels, skipped_step, loop and ncu.csv.

`--dry` runs every part in a tiny form, on a CPU too: its numbers mean nothing, its logic is the
same. Parts that need a GPU are then skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]
from _environment import ROOT, environment, write  # noqa: E402

SECONDS = 480.0
WORTH_STARTING = 0.4  # of a part's seconds: with less it is left out
GRACE = 20.0  # seconds before its limit at which a benchmark begins nothing new; imports take 10
TAIL = 1500  # characters of a part's output in the summary
LARGEST = 16 << 20  # bytes of a file
HERE = Path(__file__).parent
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__waves_per_multiprocessor",
)


@dataclass(frozen=True)
class Part:
    """One question: the command that answers it on a GPU, and its tiny form.

    `{seconds}` in a command stands for the time left to it. `tiny` is None where nothing of it runs
    without a GPU, and `needs` names a program that it cannot do without.
    """

    name: str
    seconds: float
    command: list[str]
    tiny: list[str] | None
    needs: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


def parts(out: Path) -> list[Part]:
    """All parts in order; what matters most comes first."""
    python, scratch = sys.executable, out / "scratch"
    models = ["--out", str(scratch), "--seconds", "{seconds}", "--models"]

    def script(name: str, *options: str) -> list[str]:
        return [python, str(HERE / name), *options]

    many = ["-n", "8"] if find_spec("xdist") and (os.cpu_count() or 1) > 8 else []

    def pytest(name: str, *options: str) -> list[str]:
        files = f"--junitxml={scratch / name}.xml", "-o", f"cache_dir={scratch}/cache"
        return [python, "-m", "pytest", "-q", "-p", "_at_once", *many, *files, *options]

    tune = [python, "-m", "lesa_kernels.tune", "--folder", str(out), "--seconds", "{seconds}"]
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    small = ("bench_skipped_step.py", "--out", str(scratch))
    return [
        Part("smoke", 25, script("_smoke.py"), script("_smoke.py")),
        Part(
            "kernel tests", 60,
            pytest("kernels", "tests/kernels", "tests/engine/test_graphs.py", "--ignore",
                   "tests/kernels/test_aot.py"),
            pytest("kernels", "tests/kernels/test_reference.py"),
        ),
        Part(
            "CUDA tests", 60,
            pytest("cuda", "tests/scenarios/test_cuda.py"),
            pytest("cuda", "tests/scenarios/test_cuda.py", "-k", "own_gradients"),
            environment={"LESA_TEST_DEVICE": "auto"},
        ),
        Part(
            "tune", 45,
            [*tune, "--kernels", "mix", "mix_modulate", "gram", "spline_mix",
             "--shapes", "1x4096x3072", "1x4096x64", "1x8192x5120"],
            [*tune, "--dry", "--kernels", "mix", "--shapes", "1x4x64"],
            environment=interpreted,
        ),
        Part(
            "kernels", 75,
            script("bench_kernels.py", "--out", str(scratch), "--seconds", "{seconds}",
                   "--no-compile", "--rounds", "15",
                   "--kernels", "mix", "mix_modulate", "gram", "spline_mix", "mix_fp8",
                   "--places", "FLUX.1-dev 1024x1024, hidden", "FLUX.1-dev 1024x1024, output",
                   "HunyuanVideo 720x1280x129, hidden", "HunyuanVideo 720x1280x129, output"),
            script("bench_kernels.py", "--out", str(scratch), "--tiny", "--no-compile",
                   "--rounds", "1", "--places", "FLUX.1-dev 1024x1024, hidden"),
            environment=interpreted,
        ),
        Part(
            "skipped step", 40,
            script(*small), script(*small, "--tiny", "--steps", "8", "--rounds", "2"),
        ),
        Part(
            "FLUX.1-dev loop", 80,
            script("bench_loop.py", *models, "flux.1-dev"),
            script("bench_loop.py", "--tiny", "--steps", "6", "--full-steps", "2",
                   "--rounds", "1", *models, "flux.1-dev"),
        ),
        Part(
            "other loops", 65,
            script("bench_loop.py", "--layers", "0.08", "--rounds", "1", "--add", *models,
                   "hunyuan-video", "qwen-image"),
            script("bench_loop.py", "--tiny", "--steps", "6", "--full-steps", "2",
                   "--rounds", "1", "--add", *models, "hunyuan-video", "qwen-image"),
        ),
        Part(
            "ncu", 30,
            ["ncu", "--csv", "--log-file", str(out / "ncu.csv"), "--metrics", ",".join(METRICS),
             "--profile-from-start", "off", "--clock-control", "none",
             "--kernel-name-base", "function", "--kernel-name", r"regex:^_([a-z]+_)?kernel$",
             *script("_profile_target.py", "kernels")],
            None,
            needs="ncu",
        ),
    ]  # fmt: skip


def run(part: Part, out: Path, limit: float, dry: bool) -> dict[str, Any]:
    """One part, stopped with all that it started once `limit` seconds are over."""
    command = part.tiny if dry else part.command
    row: dict[str, Any] = {"name": part.name, "status": "ok", "seconds": 0.0, "tail": ""}
    if command is None:
        return {**row, "status": "skipped: no device"}
    if part.needs and shutil.which(part.needs) is None:
        return {**row, "status": "left out", "tail": f"{part.needs} is not on PATH"}
    asked = f"{max(1.0, limit - GRACE):.0f}"
    command = [asked if word == "{seconds}" else word for word in command]
    log, begun = out / "scratch" / f"{part.name.replace(' ', '_')}.log", time.perf_counter()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, cwd=ROOT, env=_variables(part, out), stdout=sink, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            if process.wait(limit):
                row["status"] = "failed"
        except subprocess.TimeoutExpired:
            row["status"] = "timeout"
        finally:
            _end(process)
    row["seconds"] = round(time.perf_counter() - begun, 1)
    row["tail"] = log.read_text(errors="replace")[-TAIL:]
    return row


def _end(process: subprocess.Popen[bytes]) -> None:
    """Its whole group, so that no compiler or worker outlives the part."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _variables(part: Part, out: Path) -> dict[str, str]:
    """Runs from a checkout that is not installed; what `tune` finds serves the parts after it."""
    folders = [ROOT, *(ROOT / name for name in ("kernels", "testbed", "tests", "benchmarks"))]
    paths = [*map(str, folders), os.environ.get("PYTHONPATH")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
        "LESA_KERNEL_CONFIGS": str(out),
        **part.environment,
    }


def collect(out: Path) -> None:
    """One log, one report of all tests, and the benchmarks' files under names without a device."""
    scratch = out / "scratch"
    logs = sorted(scratch.glob("*.log"), key=lambda path: path.stat().st_mtime)
    text = "\n".join(f"===== {log.stem}\n{log.read_text(errors='replace')}" for log in logs)
    (out / "log.txt").write_text(text[-LARGEST // 2 :])
    suites = xml.Element("testsuites")
    for report in sorted(scratch.glob("*.xml")):
        suites.extend(_suites(report))
    xml.ElementTree(suites).write(out / "junit.xml")
    for name in ("kernels", "skipped_step", "loop"):
        for found in scratch.glob(f"{name}_*.json"):
            shutil.copyfile(found, out / f"{name}.json")


def _suites(report: Path) -> Iterator[xml.Element]:
    try:
        yield from xml.parse(report).getroot().iter("testsuite")
    except xml.ParseError:  # of a part that was stopped
        return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of what is found")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--dry", action="store_true", help="every part in a tiny form")
    options = parser.parse_args()
    out, chosen = options.out.resolve(), parts(options.out.resolve())
    if unknown := set(options.parts or ()) - {part.name for part in chosen}:
        names = ", ".join(part.name for part in chosen)
        print(f"--parts {sorted(unknown)}: choose from {names}", file=sys.stderr)
        return 2
    if not options.dry and not torch.cuda.is_available():
        print("--out: PyTorch sees no GPU here; --dry checks the logic.", file=sys.stderr)
        return 2
    (out / "scratch").mkdir(parents=True, exist_ok=True)
    chosen = [part for part in chosen if not options.parts or part.name in options.parts]
    scale = options.seconds / sum(part.seconds for part in chosen)
    cuda = torch.cuda.is_available()
    content: dict[str, Any] = {"environment": environment("cuda" if cuda else "cpu"), "parts": []}
    begun, planned = time.perf_counter(), 0.0
    for part in chosen:
        planned += part.seconds * scale
        left = begun + planned - time.perf_counter()
        if left < WORTH_STARTING * part.seconds * min(scale, 1.0):
            row = {"name": part.name, "status": "left out", "seconds": 0.0, "tail": "no time left"}
        else:
            row = run(part, out, left, options.dry)
        content["parts"].append(row)
        collect(out)
        write(out / "summary.json", content)
        print(f"{row['status']:20} {row['seconds']:6.1f} s  {part.name}", flush=True)
    shutil.rmtree(out / "scratch")
    print(json.dumps({row["name"]: row["status"] for row in content["parts"]}))
    return int(any(row["status"] in ("failed", "timeout") for row in content["parts"]))


if __name__ == "__main__":
    sys.exit(main())
