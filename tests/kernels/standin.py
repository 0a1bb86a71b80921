"""A stand-in for a GPU's driver: kernels are compiled as for sm_90, launches are written down.

    python tests/kernels/standin.py            # JSON: what `test_launch` asserts
    python tests/kernels/standin.py --time     # microseconds of the host for a launch

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
from lesa_kernels.mix_modulate import mix_modulate, prepare_mix_modulate
from lesa_kernels.spline_mix import prepare_spline_mix, spline_mix
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


class Comparison:
    """An ordinary launch beside a prepared one of the same tensors."""

    def __init__(self, ordinary: Callable[..., Any], prepared: Callable[..., Any]) -> None:
        self.ordinary, self.prepared = ordinary, prepared

    def __call__(self, *tensors: Any) -> dict[str, Any]:
        wanted, _ = calls(lambda: self.ordinary(*tensors))
        direct, planned = calls(lambda: self.prepared(*tensors))
        return {"same": direct == wanted, "checked": planned, "launches": len(direct)}

    def times(self, *tensors: Any) -> dict[str, float]:
        """Microseconds of the host for each, nothing handed to CUDA."""
        return {
            "ordinary": microseconds(lambda: self.ordinary(*tensors)),
            "prepared": microseconds(lambda: self.prepared(*tensors)),
        }


def odd(tensor: torch.Tensor) -> torch.Tensor:
    """Of the same form, at an address that is no multiple of 16 bytes."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view_as(tensor)


def of_mix(found: dict[str, Any]) -> Any:
    given = examples((1, 4096, 64), 3, fill=torch.empty)["mix"].arguments
    ring, slots, step, out = (given[name] for name in ("ring", "slots", "step", "out"))
    table, latent = torch.zeros(50, 4), torch.empty_like(out)
    other, long = torch.empty_like(out), step.long()
    compare = Comparison(
        lambda slots, step, out, latent: mix(ring, slots, table, step, out, latent=latent),
        prepare_mix(ring, table),
    )
    found["first"] = compare(slots, step, out, latent)
    found["again"] = compare(slots, step, out, latent)
    found["other addresses"] = compare(slots.clone(), step.clone(), other, latent.clone())
    found["odd step and slots"] = compare(odd(slots), odd(step), out, latent)
    found["odd result"] = compare(slots, step, odd(out), latent)
    found["odd latent"] = compare(slots, step, out, odd(latent))
    found["into the ring"] = compare(slots, step, ring[1], latent)
    found["a step of 64 bits"] = compare(slots, long, out, latent)
    found["and after all that"] = compare(slots, long, other, latent)
    Driver.stream = 8
    found["another stream"] = compare(slots, long, other, latent)
    return lambda: compare.times(slots, long, other, latent)


def of_mix_modulate(found: dict[str, Any]) -> Any:
    given = examples((1, 4096, 3072), 3, fill=torch.empty)["mix_modulate"].arguments
    names = ("slots", "step", "scale", "shift", "out")
    ring, table = given["ring"], given["table"]
    slots, step, scale, shift, out = (given[name] for name in names)
    feature, wide = torch.empty_like(out), torch.empty(50, 1, 2 * 3072, dtype=out.dtype)

    def ordinary(slots: Any, step: Any, scale: Any, shift: Any, out: Any, feature: Any) -> None:
        mix_modulate(ring, slots, table, step, scale, shift, out, feature=feature)

    compare = Comparison(ordinary, prepare_mix_modulate(ring, table))
    found["modulated, first"] = compare(slots, step, scale, shift, out, None)
    found["modulated, again"] = compare(slots, step, *wide.chunk(2, -1), feature, None)
    found["with its feature"] = compare(slots, step, scale, shift, out, feature)
    found["with it, again"] = compare(slots, step, scale, shift, feature, out)
    found["its feature into the ring"] = compare(slots, step, scale, shift, out, ring[0])
    return lambda: compare.times(slots, step, scale, shift, out, feature)


def of_spline_mix(found: dict[str, Any]) -> Any:
    given = dict(examples((1, 4096, 64), 3, fill=torch.empty)["spline_mix"].arguments)
    slots, step, out = (given.pop(name) for name in ("slots", "step", "out"))
    compare = Comparison(
        lambda slots, step, out: spline_mix(slots=slots, step=step, out=out, **given),
        prepare_spline_mix(**given),
    )
    found["gated, first"] = compare(slots, step, out)
    found["gated, again"] = compare(slots, step, torch.empty_like(out))
    return lambda: compare.times(slots, step, out)


def main() -> None:
    driver.set_active(Driver())
    found: dict[str, Any] = {}
    timers = {of.__name__: of(found) for of in (of_mix, of_mix_modulate, of_spline_mix)}
    if "--time" in sys.argv:
        found = {name.removeprefix("of_"): times() for name, times in timers.items()}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
