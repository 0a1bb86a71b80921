"""What a skipped step costs: `python benchmarks/bench_skipped_step.py`; a minute on a GPU.

The denoiser of FLUX.1-dev at full width with one block of each kind (a skipped step runs none),
called with what its pipeline's loop gave it, on Taylor's tables. In one generation per round every
call is timed by itself: `host` until it returns, `latency` until the device is done. In another
nothing waits before its end: `throughput` per call is what a skipped step adds to a loop. Two more
rows enter a block of `lesa.options`, or a `lesa.Slot`, around every call, as a server does. Writes
skipped_step_<device>.json. `--tiny` runs the same code on a small model anywhere; of its numbers
only the host's mean something, as the Python of a skipped step.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _environment import RESULTS, environment, slug, write
from _models import MODELS, build
from _timing import interleaved, summary

import lesa
from lesa.engine.config import LesaConfig

KINDS = ("host", "latency", "throughput")
FULL = (0, 1, 2)  # full steps; all others are skipped
VARIANTS: dict[str, dict[str, Any]] = {
    "output tap": {"tap": "output"},
    "output tap, no graph": {"tap": "output", "graph": "off"},
    "hidden tap": {"tap": "hidden"},
    "hidden tap, no graph": {"tap": "hidden", "graph": "off"},
    "output tap, in options": {"tap": "output"},
    "output tap, in a slot": {"tap": "output"},
}


Synchronize = Callable[[], None]


class Loop:
    """One denoiser under one configuration, called as its pipeline would call it."""

    def __init__(
        self, name: str, model: Any, scheduler: Any, calls: list[dict[str, Any]], **options: Any
    ):
        self.model, self.calls = model, calls
        self.around: Callable[[], AbstractContextManager[Any]] = nullcontext
        schedule = lesa.Schedule.explicit(FULL, len(calls))
        config = LesaConfig(lesa.Taylor(order=2), schedule=schedule, scheduler=scheduler, **options)
        lesa.apply_lesa_cache(model, config)
        if name.endswith("in options"):
            self.around = lesa.options
        elif name.endswith("in a slot"):
            slot = lesa.Slot(model)
            self.around = lambda: slot

    def step(self, index: int) -> None:
        """One call, in the context that a pipeline gives it."""
        with self.around(), self.model.cache_context("cond", step_index=index):
            self.model(**self.calls[index])

    def by_call(self, synchronize: Synchronize) -> tuple[list[float], list[float]]:
        """Seconds of each skipped call until it returns, and until the device is done."""
        host, latency = [], []
        for index in range(len(self.calls)):
            synchronize()
            start = time.perf_counter()
            self.step(index)
            returned = time.perf_counter()
            synchronize()
            if index not in FULL:
                host.append(returned - start)
                latency.append(time.perf_counter() - start)
        return host, latency

    def throughput(self, synchronize: Synchronize) -> float:
        """Seconds per skipped call where nothing waits for the device before the last."""
        for index in FULL:
            self.step(index)
        synchronize()
        start = time.perf_counter()
        for index in range(len(FULL), len(self.calls)):
            self.step(index)
        synchronize()
        return (time.perf_counter() - start) / (len(self.calls) - len(FULL))


def recorded(pipe: Any, call: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """The arguments of every call that the pipeline makes of its denoiser in the first branch."""
    calls: list[dict[str, Any]] = []

    def keep(_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not args, "the pipeline passes arguments by name"
        calls.append(kwargs)

    handle = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        pipe(**call, num_inference_steps=steps, output_type="latent")
    finally:
        handle.remove()
    each = len(calls) // steps
    # one latent for all: in the pipeline every step has a new one of the same shape
    return [{**kwargs, "hidden_states": calls[0]["hidden_states"]} for kwargs in calls[::each]]


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All variants, taking turns generation by generation."""
    pipe, call, facts = build(options.model, device, share=0.0, tiny=options.tiny)
    calls = recorded(pipe, call, options.steps)
    synchronize: Synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    loops = {
        name: Loop(name, copy.deepcopy(pipe.transformer), pipe.scheduler, calls, **settings)
        for name, settings in VARIANTS.items()
    }
    host: dict[str, list[float]] = {name: [] for name in loops}
    latency: dict[str, list[float]] = {name: [] for name in loops}

    def turn(name: str) -> float:
        for found, times in zip(loops[name].by_call(synchronize), (host, latency), strict=True):
            times[name] += found
        return loops[name].throughput(synchronize)

    for loop in loops.values():  # kernels are compiled and graphs recorded
        for _ in range(3):
            loop.throughput(synchronize)
    throughput = interleaved(
        {name: partial(turn, name) for name in loops}, options.rounds, warmup=0
    )
    rows = []
    for name, loop in loops.items():
        stats = lesa.stats(loop.model)
        rows.append(
            {
                "variant": name,
                "host_microseconds": _micro(host[name]),
                "latency_microseconds": _micro(latency[name]),
                "throughput_microseconds": _micro(throughput[name]),
                "bytes_of_the_mix": stats.ring_bytes // len(FULL) * (len(FULL) + 1),
                "stats": stats.to_dict(),
            }
        )
    return {**facts, "steps": options.steps, "rows": rows}


def show(found: dict[str, Any]) -> None:
    print(f"{found['model']}, {found['call']}, blocks built, of all: {found['blocks']}")
    for row in found["rows"]:
        times = (row[f"{kind}_microseconds"]["median"] for kind in KINDS)
        shown = " ".join(f"{t:9.1f} us {kind}" for kind, t in zip(KINDS, times, strict=True))
        print(f"  {row['variant']:22} {shown}  {row['stats']['fallbacks'] or ''}")


def _micro(seconds: list[float]) -> dict[str, Any]:
    return summary([1e6 * value for value in seconds])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--model", default="flux.1-dev", choices=[*MODELS])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="a small model, on the CPU too")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        print("Nothing was timed, since PyTorch sees no GPU here; --tiny checks the logic.")
        return
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    with torch.no_grad():
        content = {"environment": environment(device), **measure(options, device)}
    show(content)
    label = slug(torch.cuda.get_device_name()) if cuda else "cpu"
    path = options.out / f"skipped_step_{label}{'_tiny' * options.tiny}.json"
    write(path, content)
    print(f"\n{path}")


if __name__ == "__main__":
    main()
