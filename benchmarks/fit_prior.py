"""Choose the numbers of lesa-untrained: `python benchmarks/fit_prior.py`.

Runs embedded FLUX, Qwen-Image, HunyuanVideo and SDXL, accelerated by `lesa.forecasters.prior`, at
13, 10 and 8 of 50 full steps on prompts of their training split, and changes one number of its
shape at a time, keeping what is best. A run's worth is 0.4 mean + 0.3 p10 + 0.3 of the PSNR of the
mean squared error, so that single bad pictures count. Then each pipeline is left out: the shape
that is best for the three others is what stands for a model nobody has seen.
Writes benchmarks/results/prior.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from _environment import RESULTS, environment, write

import lesa
from lesa.evaluation.metrics import psnr
from lesa.evaluation.runs import generate
from lesa.forecasters.prior import Prior, Shape
from lesa.testbed import load, prompts, settings

PIPELINES = {"flux": 12, "qwen": 12, "hunyuan": 6, "sdxl": 12}  # with their prompts
COUNTS = (13, 10, 8)
START = Shape(shift=4.0, early=0.6, late=0.75, first=0.8, last=1.2, width=0.15)
# What is tried, in this order: values of some fields together.
SWEEPS: tuple[tuple[dict[str, float], ...], ...] = (
    ({"shift": 3.0}, {"shift": 5.0}, {"shift": 6.0}),
    ({"early": 0.5, "late": 0.6}, {"early": 0.7, "late": 0.8}),
    (
        {"first": 0.9, "last": 1.3, "width": 0.15},
        {"first": 1.0, "last": 1.5, "width": 0.15},
        {"first": 1.0, "last": 1.5, "width": 0.13},
        {"first": 0.9, "last": 1.3, "width": 0.13},
        {"first": 0.6, "last": 0.8, "width": 0.5},  # hardly less of a line over wide gaps
    ),
)


@dataclass
class Runs:
    """A pipeline with the pictures of its plain run, and dB of the shapes that were tried."""

    name: str
    count: int
    pipe: Any = None
    plain: Any = None
    found: dict[Shape, dict[int, list[float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pipe = load(self.name)
        self.plain = self._pictures()

    def _pictures(self) -> torch.Tensor:
        texts = prompts(self.name, self.count, seed=0, split="train")
        return generate(self.pipe, texts, range(self.count), settings(self.name)).images

    def worth(self, shape: Shape) -> float:
        """The mean over the counts, in dB."""
        if shape not in self.found:
            self.found[shape] = {count: self._measured(shape, count) for count in COUNTS}
        return float(np.mean([worth(found) for found in self.found[shape].values()]))

    def _measured(self, shape: Shape, count: int) -> list[float]:
        prior = Prior(shape)
        with lesa.accelerate(self.pipe, prior, full_steps=count):
            pictures = self._pictures()
            assert lesa.stats(self.pipe).full == count * self._calls()
        return psnr(self.plain, pictures).tolist()

    def _calls(self) -> int:
        """Denoiser calls of a step."""
        return 2 if self.name == "qwen" else 1


def worth(values: list[float]) -> float:
    """What a choice is judged by: the mean, the 10th percentile and the mean squared error."""
    found = np.array(values)
    joint = -10 * np.log10(np.mean(10 ** (-found / 10)))
    return float(0.4 * found.mean() + 0.3 * np.quantile(found, 0.1) + 0.3 * joint)


def sweep(runs: list[Runs]) -> Iterator[Shape]:
    """The best shape after every sweep over the values of some numbers."""
    best = START
    for values in SWEEPS:
        tried = [best, *(replace(best, **changed) for changed in values)]
        for shape in dict.fromkeys(tried):
            told = " ".join(f"{run.worth(shape):.2f}" for run in runs)
            print(f"{joint(runs, shape):.2f} ({told}) {shape}", flush=True)
        best = max(tried, key=lambda shape: joint(runs, shape))
        yield best


def joint(runs: list[Runs], shape: Shape) -> float:
    return float(np.mean([run.worth(shape) for run in runs]))


def keep(runs: list[Runs], report: dict[str, Any]) -> None:
    """What an earlier file has of these pipelines and prompts."""
    assert report["prompts"] == PIPELINES, "prior.json is of other prompts"
    for tried in report["tried"]:
        for run in runs:
            found = tried["psnr"][run.name].items()
            run.found[Shape(**tried["shape"])] = {int(count): values for count, values in found}


def left_out(runs: list[Runs]) -> dict[str, Any]:
    """Of each pipeline the best shape for the others, and what it is worth there."""
    rows = {}
    for run in runs:
        others = [other for other in runs if other is not run]
        chosen = max(run.found, key=lambda shape: joint(others, shape))
        own = max(run.worth(shape) for shape in run.found)
        rows[run.name] = {
            "shape": asdict(chosen),
            "worth": run.worth(chosen),
            "worth_of_its_own_best": own,
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="do not run again what is in the file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = [Runs(name, count) for name, count in PIPELINES.items()]
    if options.keep:
        keep(runs, json.loads((RESULTS / "prior.json").read_text()))
    *_, best = sweep(runs)
    tried = [
        {"shape": asdict(shape), "psnr": {run.name: run.found[shape] for run in runs}}
        for shape in runs[0].found
    ]
    report = {
        "environment": environment(),
        "prompts": PIPELINES,
        "shape": asdict(best),
        "worth": {run.name: run.worth(best) for run in runs},
        "left_out": left_out(runs),
        "tried": tried,
    }
    write(RESULTS / "prior.json", report)


if __name__ == "__main__":
    main()
