"""What profile_nsys.sh and profile_ncu.sh run: warm first, then between cudaProfilerStart and Stop.

python benchmarks/_profile_target.py kernels [--repeat N] [--place PLACE] [--history K]
python benchmarks/_profile_target.py loop [--model NAME] [--layers PART] [--tap TAP] [--steps S]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from _contenders import KERNELS, SHAPES, contenders, tensors


def profiled(warm_up: Callable[[], Any], run: Callable[[], Any]) -> None:
    """Run with the profiler on; it must have been told to wait for that."""
    warm_up()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def kernels(options: argparse.Namespace) -> None:
    """Every kernel, and the copies of as many bytes, in turn."""
    made = tensors(SHAPES[options.place], options.history, torch.device("cuda"))
    names = ("triton", "csrc", "copy", "copy kernel")
    found = [contenders(name, [made[name]], compile=False) for name in KERNELS]
    calls = [each[name][0] for each in found for name in names if name in each]

    def run() -> None:
        for _ in range(options.repeat):
            for call in calls:
                call()

    profiled(run, run)


def loop(options: argparse.Namespace) -> None:
    """One generation of a pipeline at full width, accelerated."""
    from _models import build

    import lesa

    pipe, call, facts = build(options.model, torch.device("cuda"), share=options.layers)
    print(facts)

    def run() -> None:
        pipe(**call, num_inference_steps=options.steps, output_type="latent")

    with lesa.accelerate(pipe, lesa.Taylor(order=2), full_steps=10, tap=options.tap):
        run()  # in which graphs are recorded
        profiled(run, run)
        print(lesa.stats(pipe))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kernels", "loop"))
    parser.add_argument("--place", default=[*SHAPES][0], choices=[*SHAPES])
    parser.add_argument("--history", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--model", default="flux.1-dev")
    parser.add_argument("--layers", type=float, default=0.1, help="part of the blocks")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tap", default="hidden", choices=("hidden", "output"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is nothing to profile: PyTorch sees no GPU here.")
    {"kernels": kernels, "loop": loop}[options.what](options)


if __name__ == "__main__":
    main()
