"""Every other embedded pipeline: `python benchmarks/bench_pipelines.py --pipelines qwen,sdxl`.

Trains one forecaster per pipeline on 16 prompts, at the paper's numbers of full steps, and measures
unseen prompts against training-free methods at the same number of full steps: each on its own
published list where that has this number, and on the list that the forecaster recommends. On a
U-Net also against DeepCache, and lesa with a second forecaster for the hidden tap (`lesa-hidden`).
benchmarks/results/pipelines.json is written anew after each pipeline; those that are not asked for
keep their last numbers.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from _environment import RESULTS, environment, write
from _verdict import judge, show
from bench_compare import hidden

import lesa
from lesa.demo import UNET_FULL_STEPS
from lesa.evaluation.compare import PLAIN, compare
from lesa.evaluation.method import Bench
from lesa.evaluation.methods import build_all
from lesa.testbed import PIPELINES, load, prompts, settings
from lesa.testbed.checker import accuracy
from lesa.training.progress import Progress

COUNTS = {50: (13, 10, 8), 8: (5, 4, 2), 4: (2, 1)}  # by steps, as in the paper
OTHERS = tuple(name for name in PIPELINES if name != "flux")


PEERS = ("fewer-steps", "fora", "taylorseer-1", "hicache", "foca", "spectrum")


def measure(name: str, calibration: int, unseen: int) -> dict[str, Any]:
    """Training and comparison on one pipeline."""
    pipe, call = load(name), settings(name)
    steps = call["num_inference_steps"]
    has_unet = getattr(pipe, "unet", None) is not None
    counts = UNET_FULL_STEPS if has_unet else COUNTS[steps]
    report, started = Progress(quiet=True), time.perf_counter()
    seen = prompts(name, calibration, seed=0, split="train")
    forecaster = lesa.train(pipe, seen, steps, counts, call=call, progress=report)
    seconds = time.perf_counter() - started
    bench = Bench(steps, pipe, call, seen, forecaster)
    names = (*PEERS, *(("deepcache",) if has_unet else ()), "lesa")
    methods = build_all(names, counts, bench, searched=True)
    methods += [hidden(pipe, seen, counts[-1], call)] if has_unet else []
    texts = prompts(name, unseen, seed=1, split="test")
    result = compare(pipe, texts, methods, call, seed=1000, batch_size=16, keep_pictures=len(texts))
    verdicts = judge(result.rows, counts, steps)
    show(f"{name}, {steps} steps, {unseen} unseen prompts", result, verdicts)
    return {
        "environment": environment(),
        "settings": call,
        "training": {"prompts": calibration, "seconds": seconds, "log": report.lines},
        "plain": {"seconds": result.plain_seconds, "tflops": result.plain_tflops},
        "rows": result.rows,
        "verdicts": verdicts,
        "attributes": {  # the checker takes a while: not for every peer
            label: accuracy(part.movedim(-3, -1).numpy(), texts)
            for label, part in result.pictures.items()
            if label.split(" @")[0] in (PLAIN, "lesa")
        },
        "notes": result.notes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipelines", default=",".join(OTHERS), help="a comma list")
    parser.add_argument("--prompts", type=int, default=16, help="calibration prompts")
    parser.add_argument("--unseen", type=int, default=64, help="test prompts")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of pipelines.json")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = options.out / "pipelines.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    for name in filter(None, options.pipelines.split(",")):
        report[name] = measure(name, options.prompts, options.unseen)
        report["environment"] = environment()
        write(path, report)


if __name__ == "__main__":
    main()
