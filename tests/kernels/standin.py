"""A stand-in for a GPU's driver: kernels are compiled as for sm_90, launches are written down.

    python tests/kernels/standin.py      # JSON: what `test_launch` asserts

Not in a process with TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from aot import TARGETS
from lesa_kernels.examples import examples
from lesa_kernels.launch import Launch
from lesa_kernels.mix import mix, prepare_mix
from triton.runtime import driver

CALLS: list[Any] = []


class Launcher:
    """In place of the function that hands a launch to CUDA: keeps addresses and numbers."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        grid, stream, rest = arguments[:3], arguments[3], arguments[9:]
        CALLS.append([*grid, stream, *map(_number, rest)])


def _number(argument: Any) -> Any:
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument


class Driver(SimpleNamespace):
    """What Triton asks of a driver to compile, load and launch."""

    launcher_cls = Launcher
    stream = 7
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 2**17},
        load_binary=lambda *arguments: (1, 1, 32, 0, 1024),
    )

    def get_current_target(self) -> Any:
        return TARGETS["sm_90"]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any) -> int:
        return self.stream


def calls(run: Callable[[], Any]) -> tuple[list[Any], int]:
    """The launches of `run`, and how many of them were planned (checked) for it."""
    planned, original = [], Launch.run
    Launch.run = lambda self: planned.append(self) or original(self)  # type: ignore[method-assign]
    CALLS.clear()
    try:
        run()
    finally:
        Launch.run = original  # type: ignore[method-assign]
    return list(CALLS), len(planned)


def microseconds(run: Callable[[], Any], count: int = 300) -> float:
    """Median over rounds of the host's time for one call."""
    rounds = []
    for _ in range(9):
        begun = time.perf_counter()
        for _ in range(count):
            run()
        rounds.append((time.perf_counter() - begun) / count * 1e6)
    return sorted(rounds)[4]


def main() -> None:
    driver.set_active(Driver())
    given = examples((1, 4096, 64), 3, fill=torch.empty)["mix"].arguments
    ring, slots, table, step, out = (given[k] for k in ("ring", "slots", "table", "step", "out"))
    wide, latent = torch.zeros(50, 4), torch.empty(1, 4096, 64, dtype=torch.bfloat16)
    other, odd = torch.empty_like(out), torch.empty(out.numel() + 1, dtype=out.dtype)[1:]
    odd = odd.view_as(out)
    prepared = prepare_mix(ring, wide)
    found = {}

    def compare(name: str, slots: Any, step: Any, out: Any, latent: Any) -> None:
        ordinary, _ = calls(lambda: mix(ring, slots, wide, step, out, latent=latent))
        direct, planned = calls(lambda: prepared(slots, step, out, latent))
        found[name] = {"same": direct == ordinary, "checked": planned, "launches": len(direct)}

    compare("first", slots, step, out, latent)
    compare("again", slots, step, out, latent)
    compare("other addresses", slots.clone()[:], step.clone(), other, torch.empty_like(latent))
    compare("odd step and slots", torch.zeros(4, dtype=torch.int32)[1:],
            torch.zeros(2, dtype=torch.int32)[1:], out, latent)  # fmt: skip
    compare("odd result", slots, step, odd, latent)
    compare("odd latent", slots, step, out, odd)
    compare("into the ring", slots, step, ring[1], latent)
    compare("a step of 64 bits", slots, step.long(), out, latent)
    compare("and after all that", slots, step.long(), other, latent)
    Driver.stream = 8
    compare("another stream", slots, step.long(), other, latent)
    if "--time" in sys.argv:
        found["microseconds"] = {
            "mix": microseconds(lambda: mix(ring, slots, wide, step, out, latent=latent)),
            "prepared": microseconds(lambda: prepared(slots, step, out, latent)),
        }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
