"""How far could these step lists go: `python benchmarks/bench_limit.py --pipelines flux,sdxl`.

Fits a table on each of the first unseen prompts itself, at lesa's step lists as bench_compare.py
found them, and adds what it reaches to benchmarks/results/compare/<pipeline>.json: a bound for
every forecaster of this class that serves all prompts and is fitted step by step
(`lesa.evaluation.limit`). Per prompt and list it costs about three plain runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from _environment import RESULTS, environment, write

from lesa.core.schedule import Schedule
from lesa.evaluation.compare import Comparison
from lesa.evaluation.limit import add_limits
from lesa.evaluation.method import Method
from lesa.evaluation.ranking import ours
from lesa.forecasters import LesaForecaster
from lesa.testbed import load
from lesa.util.progress import Progress


def measure(pipeline: str, report: dict[str, Any], prompts: int) -> None:
    """Complete lesa's rows by `limit` and `limit_psnr`."""
    steps = report["settings"]["num_inference_steps"]
    table = LesaForecaster("table", num_steps=steps)  # its settings are those of the default
    methods = [
        Method(
            row["method"],
            steps,
            table,
            Schedule.explicit(map(int, row["schedule"].split(":")[1].split(",")), steps),
            "searched",
        )
        for row in ours(report["rows"])
    ]
    result = Comparison(
        report["prompts"][:prompts], report["settings"], report["rows"], seed=report["seed"]
    )
    add_limits(load(pipeline), result, methods, Progress())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipelines", help="a comma list; all that were compared by default")
    parser.add_argument("--prompts", type=int, default=16, help="of the unseen prompts the first")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of compare/")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.out / "compare"
    found = sorted(path.stem for path in folder.glob("*.json"))
    for name in options.pipelines.split(",") if options.pipelines else found:
        path = folder / f"{name}.json"
        report = json.loads(path.read_text())
        measure(name, report, options.prompts)
        write(path, report | {"limit_environment": environment()})


if __name__ == "__main__":
    main()
