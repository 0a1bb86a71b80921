"""Time and the taps: `python benchmarks/bench_main_job.py`; about 20 minutes on 2 CPU cores.

Times the training of one forecaster of the embedded FLUX pipeline for one number of full steps, as
`lesa train` does it, and of one for two step counts and three numbers; then the accelerated loop.
Compares the latter at 28 steps with the training-free methods (bench_compare.py does so at 50), and
the taps. benchmarks/results/main_job.json is written anew after each part.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _environment import RESULTS, environment, write
from rich.console import Console

import lesa
from lesa.evaluation.compare import compare
from lesa.evaluation.method import Bench, Method
from lesa.evaluation.methods import build_all
from lesa.evaluation.report import rich_table
from lesa.evaluation.runs import generate
from lesa.testbed import captions, load, settings
from lesa.util.progress import Progress

COUNTS = (13, 10, 8)
FEWER = 28, (10, 8)  # steps and full steps that are compared
COLLECTED = r"^collect: ([\d.]+) s$"  # the line of the log that tells it
METHODS = (
    "fewer-steps", "fewer-steps-dpm++", "fewer-steps-unipc", "fora", "taylor-1", "hicache",
    "spectrum", "foca", "lesa",
)  # fmt: skip


def train_one(pipe: Any, calibration: list[str], call: dict[str, Any]) -> dict[str, Any]:
    """What training takes for 10 of 50 steps: in all, and without collecting."""
    started, report = time.perf_counter(), Progress(quiet=True)
    lesa.train(pipe, calibration, 50, 10, call=call, progress=report)
    seconds = time.perf_counter() - started
    collected = next(float(s) for line in report.lines for s in re.findall(COLLECTED, line))
    return {"prompts": len(calibration), "seconds": seconds, "without_collect": seconds - collected}


def train(
    pipe: Any, calibration: list[str], call: dict[str, Any]
) -> tuple[lesa.LesaForecaster, dict]:
    """The forecaster for 50 and 28 steps, and what its training took."""
    prompts = len(calibration)
    plain = {**call, "output_type": "latent"}
    started = time.perf_counter()
    for steps in (50, 28):
        for start in range(0, prompts, 8):
            batch = calibration[start : start + 8]
            seeds = range(start, start + len(batch))
            generate(pipe, batch, seeds, {**plain, "num_inference_steps": steps})
    base_seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        report = Progress(quiet=True)
        forecaster = lesa.train(
            pipe, calibration, (50, 28), COUNTS, call=call, folder=folder, progress=report
        )
        seconds = time.perf_counter() - started
        sizes = {path.name: path.stat().st_size for path in Path(folder).glob("*.safetensors")}
    facts = {
        "prompts": prompts,
        "base_generation_seconds": base_seconds,
        "train_seconds": seconds,
        "statistics_bytes": sizes,
        "log": report.lines,
    }
    return forecaster, facts


def hardness(pipe: Any, unseen: list[str], call: dict[str, Any]) -> dict[str, Any]:
    """First-order TaylorSeer on the paper's list for interval 7: 20 to 38 dB tell methods apart."""
    schedule = lesa.Schedule.every(7, 50)
    method = Method("taylor-1", 50, lesa.Taylor(1), schedule)
    return compare(pipe, unseen, [method], call, seed=1000, batch_size=16).rows[0]


def loop(
    pipe: Any, forecaster: lesa.LesaForecaster, call: dict[str, Any], rounds: int
) -> list[dict]:
    """Speed of the loop and cost of a skipped call; plain and accelerated runs take turns."""
    rows, prompts = [], captions(4, seed=5)
    for count in COUNTS:
        ratios, shares = [], []
        for _ in range(rounds):
            plain = generate(pipe, prompts, range(4), call).seconds
            with lesa.accelerate(pipe, forecaster, full_steps=count):
                fast = generate(pipe, prompts, range(4), call).seconds
                stats = lesa.stats(pipe)
            ratios.append(plain / fast)
            full = stats.seconds_full / stats.full
            shares.append(stats.seconds_skipped / stats.skipped / full)
        ideal = call["num_inference_steps"] / count
        rows.append(
            {
                "full_steps": count,
                "batch": len(prompts),
                "speedup": median(ratios),
                "share_of_ideal": median(ratios) / ideal,
                "skipped_over_full_call": median(shares),
            }
        )
    return rows


def taps(
    pipe: Any, calibration: list[str], unseen: list[str], call: dict[str, Any]
) -> list[dict[str, Any]]:
    """One forecaster per tap, fitted and judged alike at 10 full steps; decides `DEFAULT_TAP`."""
    rows = []
    for tap in ("output", "hidden"):
        report = Progress(quiet=True)
        forecaster = lesa.train(pipe, calibration, 50, (10,), tap=tap, call=call, progress=report)
        methods = build_all(("lesa",), (10,), Bench(50, forecaster=forecaster))
        row = compare(pipe, unseen, methods, call, seed=1000, batch_size=16).rows[0]
        with lesa.accelerate(pipe, forecaster, full_steps=10):
            generate(pipe, unseen[:1], range(1), call)
            stats = lesa.stats(pipe)
        rows.append(
            {
                "tap": tap,
                **{key: row[key] for key in ("psnr_mean", "psnr_p10", "psnr_min", "speedup")},
                "ring_bytes": stats.ring_bytes,
                "skipped_call_ms": 1e3 * stats.seconds_skipped / stats.skipped,
                "full_call_ms": 1e3 * stats.seconds_full / stats.full,
            }
        )
        print({key: v if isinstance(v, str) else round(v, 3) for key, v in rows[-1].items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=16, help="calibration prompts")
    parser.add_argument("--unseen", type=int, default=64, help="test prompts")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of main_job.json")
    options = parser.parse_args()
    pipe, call = load("flux"), settings("flux")
    report: dict[str, Any] = {"environment": environment()}

    def keep(name: str, part: Any) -> None:
        report[name] = part
        write(options.out / "main_job.json", report)

    calibration = captions(options.prompts, seed=0, split="train")
    keep("training of one count", train_one(pipe, calibration, call))
    forecaster, training = train(pipe, calibration, call)
    keep("training", training)
    unseen = captions(options.unseen, seed=1, split="test")
    keep("hardness", hardness(pipe, unseen, call))
    steps, counts = FEWER
    own = {**call, "num_inference_steps": steps}
    methods = build_all(METHODS, counts, Bench(steps, pipe, own, [], forecaster), searched=True)
    result = compare(pipe, unseen, methods, own, seed=1000, batch_size=16)
    Console().print(rich_table(result.rows, result.plain_seconds, steps))
    keep(f"{steps} steps", {"rows": result.rows})
    keep("loop", loop(pipe, forecaster, call, rounds=5))
    for row in report["loop"]:
        print({key: round(value, 4) for key, value in row.items()})
    keep("taps", taps(pipe, calibration, unseen[:32], call))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
