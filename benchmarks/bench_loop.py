"""The denoising loop at full size: `python benchmarks/bench_loop.py`; 3 minutes on an H200.

FLUX.1-dev, Qwen-Image and HunyuanVideo with random weights, in the real loop of their diffusers
pipelines without encoders and decoder: 50 steps, plain and with 10 full ones. Neither time nor
memory depends on the coefficients, so Taylor's tables stand for trained ones here; the quality of
pictures is for `lesa compare`. By default the two larger models keep a part of their blocks only,
beside which a skipped step looks dearer than it is; `--layers 1` keeps all. Writes
loop_<device>.json after each model. `--tiny` runs the same code on small models anywhere; its
numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _environment import RESULTS, environment, slug, write
from _models import MODELS, build
from _timing import Timer, interleaved, ratios, summary, wall_timer
from diffusers import TaylorSeerCacheConfig

import lesa
from lesa.cli.full_step import set_attention, why_not
from lesa.errors import LesaError

FLASH = "plain, flash-attn"
WARM_UP = 3  # steps in which a library loads its kernels


class Variant(NamedTuple):
    """One way to run the loop: how many of its steps are full, and what is switched on for it."""

    full_steps: int
    num_steps: int
    switch: Callable[[], AbstractContextManager[Any]] = nullcontext
    ours: bool = False


def variants(pipe: Any, steps: int, full: int) -> dict[str, Variant]:
    """The contenders; the peers at their own full steps, as near to `full` as they come."""

    def ours(forecaster: Any, count: int = full, flash: bool = False, **options: Any) -> Variant:
        switches = [partial(lesa.accelerate, pipe, forecaster, **options)]
        switches += [partial(_flash, pipe)] * flash
        return Variant(count, steps, partial(_all, switches), True)

    taylor, interval = lesa.Taylor(order=2), -(-steps // full)
    fora = lesa.Schedule.fora(interval, steps)
    lite = TaylorSeerCacheConfig(cache_interval=interval, use_lite_mode=True)
    lite_full = 3 + sum((step - 4) % interval == 0 for step in range(3, steps))  # by its own rule
    return {
        "plain": Variant(steps, steps),
        "fewer steps": Variant(full, full),
        "lesa, output tap": ours(taylor, full_steps=full, tap="output"),
        "lesa, hidden tap": ours(taylor, full_steps=full, tap="hidden"),
        "lesa, hidden tap, no graph": ours(taylor, full_steps=full, tap="hidden", graph="off"),
        "FORA's reuse, by this engine": ours(
            lesa.Reuse(), len(fora.full_steps), schedule=fora, tap="output"
        ),
        "TaylorSeer-Lite of diffusers": Variant(lite_full, steps, partial(_cached, pipe, lite)),
        FLASH: Variant(steps, steps, partial(_flash, pipe)),
        "lesa, output tap, flash-attn": ours(taylor, full_steps=full, tap="output", flash=True),
    }


def measure(
    name: str,
    options: argparse.Namespace,
    deadline: float,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """All variants of one model, taking turns; what is found so far goes to `keep`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe, call, facts = build(name, device, share=options.layers, tiny=options.tiny)
    chosen = variants(pipe, options.steps, options.full_steps)
    notes: dict[str, dict[str, Any]] = {key: {} for key in chosen}
    failures: dict[str, str] = {}
    timers = {
        key: _timer(pipe, call, variant, notes[key], device) for key, variant in chosen.items()
    }

    def found(seconds: dict[str, list[float]]) -> None:
        rows = [_row(key, chosen[key], seconds, options.steps, notes[key]) for key in seconds]
        keep({**facts, "steps": options.steps, "rows": rows, "failures": failures})

    found(
        interleaved(
            timers, options.rounds, warmup=0, deadline=deadline, failures=failures, each_round=found
        )
    )


def _row(
    key: str, variant: Variant, seconds: dict[str, list[float]], steps: int, notes: dict[str, Any]
) -> dict[str, Any]:
    """A variant's seconds, and what they are of the plain loop's where that has run."""
    row = {"variant": key, "full_steps": variant.full_steps, "steps": variant.num_steps}
    row["seconds"] = summary(seconds[key])
    if "plain" in seconds:
        row["speedup"] = ratios(seconds, "plain", key)
        row["share_of_ideal"] = row["speedup"]["median"] * variant.full_steps / steps
    return {**row, **notes}


def _timer(
    pipe: Any, call: dict[str, Any], variant: Variant, notes: dict[str, Any], device: torch.device
) -> Timer:
    """Seconds of one warm generation; its memory, and what lesa counted, go into `notes`."""
    cuda = device.type == "cuda"
    synchronize = partial(torch.cuda.synchronize, device) if cuda else lambda: None

    def generate(steps: int = variant.num_steps) -> None:
        draw = torch.Generator(device).manual_seed(0)
        settings = {**call, "num_inference_steps": steps, "generator": draw}
        result = pipe(**settings, output_type="latent", return_dict=False)[0]
        notes["finite"] = bool(result.isfinite().all())

    def once() -> float:
        if cuda:
            torch.cuda.empty_cache()  # what a variant that failed has left
        with variant.switch():
            if variant.ours:
                generate()  # in which kernels are compiled and graphs recorded
            elif not notes:
                generate(min(WARM_UP, variant.num_steps))
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
                notes["allocated_before_bytes"] = torch.cuda.memory_allocated(device)
            seconds = wall_timer(generate, synchronize)()
            if cuda:
                notes["peak_bytes"] = torch.cuda.max_memory_allocated(device)
            if variant.ours:
                stats = lesa.stats(pipe)
                notes.update(ring_bytes=stats.ring_bytes, stats=stats.to_dict())
        return seconds

    return once


@contextmanager
def _all(switches: Sequence[Callable[[], AbstractContextManager[Any]]]) -> Iterator[None]:
    with ExitStack() as stack:
        for switch in switches:
            stack.enter_context(switch())
        yield


@contextmanager
def _flash(pipe: Any) -> Iterator[None]:
    """The attention of the package flash-attn, where it is usable; LesaError says why not."""
    parameter = next(pipe.transformer.parameters())
    if reason := why_not("flash", parameter.device.type, parameter.dtype):
        raise LesaError(reason)
    set_attention(pipe, "flash")
    try:
        yield
    finally:
        set_attention(pipe, "native")


@contextmanager
def _cached(pipe: Any, config: Any) -> Iterator[None]:
    pipe.transformer.enable_cache(config)
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


def show(found: dict[str, Any]) -> None:
    scale = "full size" if found["full_size"] else f"blocks built, of all: {found['blocks']}"
    print(f"\n{found['model']}, {scale}, {found['call']}")
    for row in found["rows"]:
        gain = ""
        if "speedup" in row:
            gain = f"{row['speedup']['median']:5.2f}x {row['share_of_ideal']:6.1%} of ideal"
        peak = f"peak {row['peak_bytes'] / 2**30:6.2f} GiB" if "peak_bytes" in row else ""
        ring = f"ring {row['ring_bytes'] / 1e6:7.1f} MB" if "ring_bytes" in row else ""
        trouble = "" if row["finite"] else " NOT FINITE"
        trouble += f" {row['stats']['fallbacks']}" if row.get("stats", {}).get("fallbacks") else ""
        print(
            f"  {row['variant']:38} {row['full_steps']:3d} full {row['seconds']['median']:8.3f} s"
            f" {gain}  {peak} {ring}{trouble}"
        )
    for key, reason in found["failures"].items():
        print(f"  {key:38} left out: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--layers", type=float, help="part of the blocks to keep, 0 to 1")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--full-steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=120, help="begin no round after these")
    parser.add_argument("--add", action="store_true", help="keep the file's other models")
    parser.add_argument("--tiny", action="store_true", help="small models, on the CPU too")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        print("Nothing was timed, since PyTorch sees no GPU here; --tiny checks the logic.")
        return
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    label = slug(torch.cuda.get_device_name()) if cuda else "cpu"
    path = options.out / f"loop_{label}{'_tiny' * options.tiny}.json"
    content: dict[str, Any] = {"environment": environment(device), "models": []}
    if options.add and path.exists():
        known = json.loads(path.read_text())["models"]
        content["models"] = [row for row in known if row["model"] not in options.models]
    start = time.perf_counter()
    models = {row["model"]: row for row in content["models"]}

    def keep(found: dict[str, Any]) -> None:
        models[found["model"]] = found
        write(path, {**content, "models": [*models.values()]})

    for index, name in enumerate(options.models, 1):
        share = start + options.seconds * index / len(options.models)  # each its part of the time
        try:
            measure(name, options, share, keep)
        except Exception as error:  # the next model is another question
            traceback.print_exc()
            content.setdefault("left_out", []).append([name, f"{type(error).__name__}: {error}"])
        if name in models:
            show(models[name])
        if cuda:
            torch.cuda.empty_cache()
    write(path, {**content, "models": [*models.values()]})
    print(f"\n{path}")


if __name__ == "__main__":
    main()
