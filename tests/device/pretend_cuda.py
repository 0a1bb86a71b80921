"""What belongs to a pretended device: `torch.cuda`, graphs, and Triton's kernels.

A kernel is checked and launched by its own launcher; where the compiled code would run, its float64
reference does, if all tensors lie on the device that is current. A graph is the operators and
kernels that ran while it was recorded, again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device.pretend import HOST, PretendGpu, constructors, held
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lesa.engine import ring
from lesa.evaluation.peers.tokenwise import rules
from lesa.util import numerics

DEVICES = 2
KERNELS = ("mix", "mix_modulate", "spline_mix")  # those that a pipeline launches


@contextmanager
def pretend_gpu() -> Iterator[PretendGpu]:
    """Two devices for the length of a `with` block, in this thread."""
    gpu = PretendGpu()
    torch._C._ensureCUDADeviceGuardSet()  # where torch knows CUDA, but finds no device
    with HOST:  # torch remembers here which functions a `with torch.device(...)` is for
        torch.empty(0)
    _forget_devices()
    with pytest.MonkeyPatch.context() as patches:
        for owner, functions in {torch.cuda: _cuda(gpu), **constructors(gpu)}.items():
            for name, function in functions.items():
                patches.setattr(owner, name, function)
        for name in KERNELS:
            module = import_module(f"lesa_kernels.{name}")
            patches.setattr(module, "_plan", partial(_planned, gpu, name, module._plan))
        # else `module.to` would put a pretended tensor's shell into a plain parameter
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with gpu:
                yield gpu
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
            _forget_devices()


def _forget_devices() -> None:
    """What lesa keeps by device for as long as a process lasts."""
    for kept in (ring._slots, numerics._has_float64, rules._drawn):
        kept.cache_clear()


def _planned(gpu: PretendGpu, name: str, plan: Callable[..., Any], *args: Any) -> Any:
    """A launch as its launcher has made it, of a kernel that is pretended."""
    launch = plan(*args)
    if launch is None:
        return None
    from lesa_testbed import reference

    given = inspect.signature(plan).bind(*args).arguments
    return launch._replace(kernel=_Kernel(gpu, name, partial(getattr(reference, name), **given)))


class _Kernel:
    """`kernel[grid](*arguments, **constants)`."""

    def __init__(self, gpu: PretendGpu, name: str, compute: partial[Any]) -> None:
        self._gpu, self._name, self._compute = gpu, name, compute

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, **constants: Any) -> None:
        gpu, here = self._gpu, torch.device("cuda", self._gpu.current)
        found = {argument.device for argument in arguments if isinstance(argument, Tensor)}
        if found != {here}:
            listed = ", ".join(sorted(map(str, found)))
            raise RuntimeError(f"{self._name} was launched on {here} with tensors on {listed}")
        gpu.launches[self._name, here] += 1
        compute = partial(self._compute.func, **held(self._compute.keywords))
        with _disable_current_modes():
            compute()
        if gpu.tape is not None:
            gpu.tape.append(compute)


class _Graph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    gpu: PretendGpu
    _steps: list[Callable[[], object]] | None = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        assert self.gpu.tape is None
        self.gpu.tape = []

    def capture_end(self) -> None:
        self._steps, self.gpu.tape = self.gpu.tape, None

    def replay(self) -> None:
        assert self._steps, "nothing was recorded"
        with _disable_current_modes():
            for step in self._steps:
                step()

    def reset(self) -> None:
        self._steps = None


class _Stream:
    """Stands in for `torch.cuda.Stream`: there is one queue, so nothing overtakes anything."""

    cuda_stream = 0

    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: _Stream) -> None:
        pass


def _cuda(gpu: PretendGpu) -> dict[str, Any]:
    """What Python asks of `torch.cuda`, by name."""

    def exchange(index: int) -> int:
        before = gpu.current
        gpu.current = before if index < 0 else index
        return before

    # Of which a graph takes note of the state.
    generator = SimpleNamespace(
        clone_state=lambda: None,
        graphsafe_get_state=lambda: None,
        graphsafe_set_state=lambda state: None,
    )
    properties = SimpleNamespace(
        name="Pretend GPU", multi_processor_count=8, total_memory=2**34, major=9, minor=0
    )
    return {
        "CUDAGraph": type("Graph", (_Graph,), {"gpu": gpu}),
        "Stream": _Stream,
        "_exchange_device": exchange,
        "_lazy_init": lambda: None,
        "_maybe_exchange_device": exchange,
        "current_device": lambda: gpu.current,
        "current_stream": _Stream,
        "default_generators": (generator,) * DEVICES,
        "device_count": lambda: DEVICES,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "graph_pool_handle": lambda: object(),
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: gpu.tape is not None,
        "max_memory_allocated": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "mem_get_info": lambda device=None: (2**34, 2**34),
        "reset_peak_memory_stats": lambda device=None: None,
        "set_device": lambda device: exchange(gpu.device(device).index),
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda device=None: gpu.note("synchronize"),
    }
