"""What an fp8 ring costs in fidelity: `python benchmarks/bench_fp8_ring.py`, 4 minutes on 2 cores.

Features are rounded to float8_e4m3fn with one scale per token as they enter the ring, half the
bytes of a bf16 ring (see `lesa_kernels.experimental.fp8`); forecasts are then those that `mix_fp8`
computes. Unseen prompts of the embedded pipeline, 10 of 50 steps in full, against the plain run.
Writes benchmarks/results/fp8_ring.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _environment import RESULTS, environment, write
from lesa_testbed import reference
from torch import Tensor

import lesa
from lesa.engine import trajectory
from lesa.engine.ring import Ring
from lesa.evaluation.compare import compare
from lesa.evaluation.method import Method
from lesa.testbed import captions, load, settings

FULL_STEPS = 10


class RoundedRing(Ring):
    """A ring whose features have been through fp8."""

    def push(self, feature: Tensor) -> None:
        super().push(rounded(feature))


def rounded(feature: Tensor) -> Tensor:
    """A feature [..., C] as the fp8 kernels store it, back in its own dtype."""
    ring = torch.empty(1, *feature.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(1, feature[..., 0].numel())
    reference.push_fp8(feature, ring, scales, torch.tensor(0))
    return (ring[0].float() * scales.view(*feature.shape[:-1], 1)).to(feature.dtype)


@contextmanager
def fp8_rings() -> Iterator[None]:
    """Trajectories make rounded rings meanwhile."""
    trajectory.Ring = RoundedRing  # type: ignore[misc]
    try:
        yield
    finally:
        trajectory.Ring = Ring  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8, help="calibration prompts")
    parser.add_argument("--unseen", type=int, default=16, help="test prompts")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of fp8_ring.json")
    options = parser.parse_args()
    pipe, call = load("flux"), settings("flux")
    unseen = captions(options.unseen, seed=1, split="test")
    report: dict[str, Any] = {"environment": environment(), "rows": []}
    for tap in ("output", "hidden"):
        trained = lesa.train(
            pipe, captions(options.prompts, seed=0, split="train"), 50, FULL_STEPS,
            tap=tap, call=call, progress=False,
        )  # fmt: skip
        peers = [lesa.Taylor(1)] if tap == "output" else []
        for forecaster in (trained, *peers):
            schedule = trained.schedule_for(FULL_STEPS, 50)
            method = Method(forecaster.name, 50, forecaster, schedule, "searched")
            exact = judged(pipe, unseen, method, call)
            with fp8_rings():
                fp8 = judged(pipe, unseen, method, call)
            row = {"tap": tap, "forecaster": forecaster.name, "exact": exact, "fp8": fp8}
            row["loss_db"] = exact["psnr_mean"] - fp8["psnr_mean"]
            report["rows"].append(row)
            print(row, flush=True)
            write(options.out / "fp8_ring.json", report)


def judged(pipe: Any, unseen: list[str], method: Method, call: dict[str, Any]) -> dict[str, float]:
    """Float PSNR over the prompts, in dB."""
    row = compare(pipe, unseen, [method], call, seed=1000, batch_size=16).rows[0]
    return {key: row[key] for key in ("psnr_mean", "psnr_p10", "psnr_min")}


if __name__ == "__main__":
    main()
