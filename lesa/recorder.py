"""The device's part of a graph: whether a body may be recorded now, and how."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import nn

from lesa.swap import Listener, Tap

__all__ = ["Body", "CudaRecorder", "Handle", "Recorder", "refusal"]

_MOVING = ("group_offloading", "lazy_prefetch_group_offloading", "layerwise_casting")
_WARM_UPS = 3

Body = Callable[[], object]


class Handle(Protocol):
    """A recorded body: a `torch.cuda.CUDAGraph`, or what stands in for it."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


class Recorder(Protocol):
    """The device's part; `CudaRecorder` says what each method is for."""

    def refusal(self, device: torch.device) -> str | None: ...

    def stream(self, device: torch.device) -> int: ...

    def warm_up(self, body: Body, device: torch.device) -> None: ...

    def capture(self, body: Body, device: torch.device) -> Handle: ...

    def release(self, handle: Handle) -> None: ...


def refusal(
    modules: Iterable[nn.Module],
    device: torch.device,
    *,
    recorder: Recorder | None = None,
    model: nn.Module | None = None,
) -> str | None:
    """Why a body that calls these modules is not to be recorded on `device` now, or None.

    `model` is the whole denoiser, on which offloading may hang its hook.
    """
    if reason := (recorder or CudaRecorder()).refusal(device):
        return reason
    if os.environ.get("LESA_DISABLE_GRAPH", "0") not in ("", "0"):
        return "LESA_DISABLE_GRAPH is set"
    if torch.is_grad_enabled():
        return "grad is enabled"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    called = [each for module in modules for each in module.modules()]
    for module in called if model is None else [*called, model]:
        if hook := _moving_hook(module):
            return f"{hook} is on {type(module).__name__}"
    for module in called:
        name = type(module).__name__
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if not all(
            isinstance(hook, (Tap, Listener)) for hook in hooks
        ):  # a replay would not call it
            return f"a forward hook is on {name}"
        for tensor in (*module.parameters(False), *module.buffers(False)):
            if tensor.device != device:
                return f"weights of {name} are on {tensor.device}, the feature on {device}"
    return None


def _moving_hook(module: nn.Module) -> str | None:
    """The hook of accelerate or diffusers that moves or casts this module's weights, if any."""
    for hook in _unpacked(getattr(module, "_hf_hook", None)):
        # AlignDevicesHook, CpuOffload and LayerwiseCastingHook, in this order
        moves = getattr(hook, "offload", False) or hasattr(hook, "prev_module_hook")
        if moves or hasattr(hook, "storage_dtype"):
            return f"accelerate's {type(hook).__name__}"
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return next((f"diffusers' {name}" for name in _MOVING if name in hooks), None)


def _unpacked(hook: Any) -> Iterator[Any]:
    yield hook
    for inner in getattr(hook, "hooks", ()):
        yield from _unpacked(inner)


class _Pool:
    """Memory that the graphs of one stream share, and the stream that they are captured on."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.graphs: weakref.WeakSet[Handle] = weakref.WeakSet()
        self.token: Any = None


class CudaRecorder:
    """Records with `torch.cuda.graph`.

    Graphs replayed on one stream run one after another, and nothing that a body allocates is read
    after it: so they share one pool of memory, which goes with the last of them.
    """

    _turn = threading.Lock()  # torch captures one graph at a time in a process

    def __init__(self) -> None:
        self._pools: dict[Any, _Pool] = {}

    def refusal(self, device: torch.device) -> str | None:
        """Why this device records nothing now, or None."""
        if device.type != "cuda":
            return f"{device.type} is not a CUDA device"
        capturing = torch.cuda.is_current_stream_capturing()
        return "a stream capture is under way" if capturing else None

    def stream(self, device: torch.device) -> int:
        """The current stream: what runs on one is in order, so graphs of two share nothing."""
        return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0

    def warm_up(self, body: Body, device: torch.device) -> None:
        """Run it on a side stream, so that Triton has compiled and cuBLAS has its handle."""
        current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(current)
        with torch.cuda.device(device), torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                body()
        current.wait_stream(side)

    def capture(self, body: Body, device: torch.device) -> Handle:
        """Record it without running it; where that fails, nothing is left of the attempt."""
        where = device, self.stream(device)
        with self._turn, torch.cuda.device(device):
            pool = self._pools.setdefault(where, _Pool(device))
            if not pool.graphs:  # the memory behind a token goes with its last graph
                pool.token = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                # torch.cuda.graph restores the stream only if all went well, the outer one always
                with (
                    torch.cuda.stream(pool.stream),
                    torch.cuda.graph(
                        graph, pool.token, pool.stream, capture_error_mode="thread_local"
                    ),
                ):
                    body()
            except BaseException:
                graph.reset()
                del self._pools[where]
                # after a capture that CUDA broke off, the allocator would go on recording
                with suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(device.index, pool.token)
                    torch._C._cuda_releasePool(device.index, pool.token)
                raise
            pool.graphs.add(graph)
        return graph

    def release(self, handle: Handle) -> None:
        """Give its memory back, but not while a capture counts on the pool."""
        with self._turn:
            for pool in self._pools.values():
                pool.graphs.discard(handle)
            handle.reset()
