"""How much faster several processes train: `python benchmarks/bench_ranks.py`; minutes on 2 cores.

Two parts. *Seconds*: one process and two (gloo, a thread each) collect on an embedded pipeline, in
turns, with the results compared; seconds of the clock, and of the processor for the busiest
process, which other jobs change less. *Batches*: which batches of the denoiser a default training
runs one after the other, counted on a tiny FLUX with random weights, and so how much faster any
number of ranks can be at most: they depend on prompts and lists, not on a model's size.
Writes benchmarks/results/ranks.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from itertools import product
from math import ceil
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from _environment import RESULTS, ROOT, environment, write

sys.path.insert(0, str(ROOT / "tests"))

import processes  # noqa: E402
import torch  # noqa: E402
from training_jobs import make  # noqa: E402

import lesa  # noqa: E402
from lesa import testbed  # noqa: E402
from lesa.training import Job, collect  # noqa: E402
from lesa.training.batch import Batch  # noqa: E402
from lesa.util.ranks import joined  # noqa: E402

RANKS = (1, 2, 4, 8, 16, 32, 64, 1000)
BATCHES = (1, 4, 8)
CALIBRATION = 32  # prompts of the counted training


def seconds(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of a collection by one process and by two, in turns, and how far results differ."""
    pipe, call = testbed.load(options.pipeline), testbed.settings(options.pipeline)
    steps = options.steps or call["num_inference_steps"]
    del call["num_inference_steps"]
    texts = testbed.captions(options.prompts, seed=3, split="train")
    rows, first = [], None
    for number, size in product(range(options.rounds), (1, 2)):
        with TemporaryDirectory() as folder:
            parts = collected(pipe, texts, call, steps, options.batch_size, size, Path(folder))
        first = parts[0][1] if first is None else first
        clock, processor = (max(part[0][at] for part in parts) for at in range(2))
        apart = max(float((joint - first).abs().max()) for _, joint in parts)
        took = {"seconds": clock, "processor seconds": processor}
        rows.append({"round": number, "ranks": size, **took, "largest difference": apart})
        print(rows[-1], flush=True)
    return rows


def collected(
    pipe: Any, texts: list[str], call: dict[str, Any], steps: int, batch: int, size: int, out: Path
) -> list[tuple[tuple[float, float], Any]]:
    """Seconds of the clock and of the processor, and inner products, of each process."""

    def work(rank: int) -> None:
        with joined() as ranks:
            job = Job(pipe, texts, call, batch_size=batch, ranks=ranks)
            ranks.wait()
            begun = time.perf_counter(), time.process_time()
            joint = collect(job, steps).joint
            ended = time.perf_counter(), time.process_time()
            took = ended[0] - begun[0], ended[1] - begun[1]
            torch.save((took, joint), out / f"{rank}.pt")

    ended = processes.launch(size, work, out)
    if any(code for code, _ in ended):
        raise SystemExit(f"a process has failed: {ended}")
    return [torch.load(out / f"{rank}.pt") for rank in range(size)]


def counted(steps: int, counts: Sequence[int]) -> list[int]:
    """Rows of every call that the phases after the collection make of the denoiser."""
    rows: list[int] = []
    compute = Batch.compute

    def counting(self: Batch, some: list[int], job: Job, *more: Any) -> Any:
        rows.append(len(some))
        return compute(self, some, job, *more)

    pipe, call = make("flux", CALIBRATION)
    call.pop("true_cfg_scale")  # FLUX.1-dev: guidance is an input, a step is one row
    Batch.compute = counting  # type: ignore[method-assign]
    try:
        lesa.train(pipe, None, steps, counts, call=call, progress=False, batch_size=CALIBRATION)
    finally:
        Batch.compute = compute  # type: ignore[method-assign]
    return rows


def bounds(steps: int, later: Sequence[int]) -> list[dict[str, Any]]:
    """How many batches run one after the other, by ranks and rows of a batch."""
    found = []
    for size in BATCHES:
        batches = ceil(CALIBRATION / size)
        alone = steps * batches, sum(ceil(rows / size) for rows in later)
        for ranks in RANKS:
            plain = steps * ceil(batches / ranks)
            rest = sum(ceil(ceil(rows / size) / ranks) for rows in later)
            found.append(
                {
                    "batch size": size,
                    "ranks": ranks,
                    "fits": ranks <= batches,
                    "batches of the plain run": plain,
                    "batches of the accelerated runs": rest,
                    "times faster, plain run": alone[0] / plain,
                    "times faster, accelerated runs": alone[1] / rest,
                    "times faster": sum(alone) / (plain + rest),
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="flux", choices=testbed.PIPELINES)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("seconds", "batches"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.out / "ranks.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    torch.set_num_threads(1)
    if options.only != "batches":
        rows = seconds(options)
        faster = {}
        for kind in ("seconds", "processor seconds"):
            by = {n: median(row[kind] for row in rows if row["ranks"] == n) for n in (1, 2)}
            faster[f"times faster by {kind}"] = by[1] / by[2]
        found["seconds"] = {"environment": environment(), "rows": rows, **faster}
        write(path, found)
        print(faster)
    if options.only != "seconds":
        steps, counts = 50, (10,)
        later = counted(steps, counts)
        found["batches"] = {
            "environment": environment(),
            "training": {"prompts": CALIBRATION, "steps": steps, "full steps": counts},
            "rows of later calls": later,
            "bounds": bounds(steps, later),
        }
        write(path, found)
        for row in found["batches"]["bounds"]:
            print({name: round(value, 2) for name, value in row.items()})


if __name__ == "__main__":
    main()
