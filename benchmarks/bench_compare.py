"""Every method on the embedded pipelines: `python benchmarks/bench_compare.py --pipelines flux`.

Trains one forecaster per pipeline on 16 prompts at 13, 10, 8 and 6 full steps (few-step pipelines:
the paper's counts), then runs all peers that can run there, each on its own published schedule and
on the list that was searched for lesa, on the same unseen prompts and seeds. Writes
benchmarks/results/compare/<pipeline>.json, and with `--report FOLDER` also the HTML report.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from _environment import RESULTS, environment, write

import lesa
from lesa.contest import left_out, prepare
from lesa.demo import FULL_STEPS
from lesa.evaluation.compare import PLAIN, Comparison, compare
from lesa.evaluation.judges import attributes
from lesa.evaluation.limit import add_limits
from lesa.evaluation.method import Bench
from lesa.evaluation.report import write_report
from lesa.testbed import PIPELINES, load, prompts, settings
from lesa.training.progress import Progress

COUNTS = FULL_STEPS | {50: (13, 10, 8, 6)}  # by steps of the sampler
CALIBRATION = 16


def measure(name: str, methods: str, unseen: int, batch_size: int) -> tuple[Comparison, Any]:
    """Training, comparison, and what was logged of the training."""
    pipe, call = load(name), settings(name)
    steps = call["num_inference_steps"]
    log, started = Progress(quiet=True), time.perf_counter()
    seen = prompts(name, CALIBRATION, seed=0, split="train")
    forecaster = lesa.train(pipe, seen, steps, COUNTS[steps], call=call, progress=log)
    training = {
        "prompts": CALIBRATION,
        "seconds": time.perf_counter() - started,
        "log": log.lines,
    }
    print(f"{name}: trained in {training['seconds']:.0f} s", flush=True)
    bench = Bench(steps, pipe, call, seen, forecaster)
    contenders = prepare(methods, COUNTS[steps], bench, searched=True)
    print(f"{name}: {len(contenders)} rows prepared", flush=True)

    def advance(label: str) -> None:
        if label == PLAIN:  # the first of each batch
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)

    texts = prompts(name, unseen, seed=1, split="test")
    options = dict(seed=1000, batch_size=batch_size)
    result = compare(pipe, texts, contenders, call, advance=advance, **options)
    ours = [method for method in contenders if method.name == "lesa"]
    judged = compare(pipe, texts, ours, call, judges=[attributes], **options)  # it is slow
    result.plain_more |= judged.plain_more
    scores = {row["label"]: row["scores"] for row in judged.rows}
    for row in result.rows:
        row |= {"scores": scores[row["label"]]} if row["label"] in scores else {}
    add_limits(pipe, result, contenders)
    result.notes += left_out(methods, bench)
    return result, training


def shares(result: Comparison) -> dict[str, dict[str, float]]:
    """What the checker found in the plain run's and lesa's pictures."""
    runs = [("plain run", result.plain_more["scores"])]
    runs += [(row["label"], row["scores"]) for row in result.rows if row["method"] == "lesa"]
    return {label: {key: s["value"] for key, s in scores.items()} for label, scores in runs}


def rounded(value: Any) -> Any:
    """The same with six significant digits, so that the files stay small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipelines", default=",".join(PIPELINES), help="a comma list")
    parser.add_argument("--methods", default="all", help="all, or a comma list with lesa")
    parser.add_argument("--unseen", type=int, default=64, help="test prompts")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", type=Path, help="folder; a subfolder for every pipeline")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of compare/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.pipelines.split(","):
        begun = environment()  # its commit is what runs
        result, training = measure(name, options.methods, options.unseen, options.batch_size)
        if options.report:
            write_report(result, options.report / name, title=f"lesa compare: {name}")
        found = {"environment": begun, "training": training, "attributes": shares(result)}
        write(options.out / "compare" / f"{name}.json", rounded(result.to_dict() | found))


if __name__ == "__main__":
    main()
