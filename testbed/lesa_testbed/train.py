"""Train an embedded pipeline: ``python -m lesa_testbed.train flux --run runs/flux``.

Every maker is seeded and resumable at its last checkpoint, and leaves the finished pipeline in
``RUN/export``, with its log, its plan and the hashes of its weights; copied to
``testbed/lesa_testbed/pipelines/NAME`` it is what is shipped. Up to two hours each on 2 CPU cores.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

import torch

from lesa_testbed.makers.common import Run, record

# pipeline -> module of lesa_testbed.makers, name of its plan
MAKERS = {
    "flux": ("flux", "Plan"),
    "qwen": ("qwen", "Plan"),
    "hunyuan": ("hunyuan", "Plan"),
    "sdxl": ("sdxl", "Plan"),
    "schnell": ("few_steps", "Schnell"),
    "lightning": ("few_steps", "Lightning"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline", choices=MAKERS)
    parser.add_argument("--run", type=Path, help="folder of checkpoints and the log")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    module, plan = MAKERS[options.pipeline]
    maker = import_module(f"lesa_testbed.makers.{module}")
    run = Run(options.run or Path("runs") / options.pipeline, getattr(maker, plan)())
    torch.manual_seed(run.plan.seed)
    maker.train(run)
    record(run, run.folder / "export")


if __name__ == "__main__":
    main()
