"""The device's part of a graph: how a body is recorded."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Body", "CudaRecorder", "Handle", "Recorder", "Recording"]

_WARM_UPS = 2

Body = Callable[[], Tensor]


class Handle(Protocol):
    """A recorded body: a `torch.cuda.CUDAGraph`, or what stands in for it."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


class Recording(NamedTuple):
    """A recorded body and the tensor that each replay overwrites."""

    handle: Handle
    output: Tensor


class Recorder(Protocol):
    """The device's part; `CudaRecorder` says what each method is for."""

    def refusal(self, device: torch.device) -> str | None: ...

    def stream(self, device: torch.device) -> int: ...

    def warm_up(self, body: Body, device: torch.device) -> Tensor: ...

    def capture(self, body: Body, device: torch.device) -> Recording: ...

    def release(self, handle: Handle) -> None: ...


@contextmanager
def _random_state_aside(device: torch.device) -> Iterator[None]:
    """Let a capture that begins mark a copy of the device's random state as being captured.

    The state itself is back before anything runs: other threads draw from it meanwhile, and where
    CUDA breaks a capture off, torch leaves the mark, with which no random number can be drawn.
    """
    generator = torch.cuda.default_generators[device.index]
    state = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(state)


class _Pool:
    """Memory that the graphs of one stream share, and the stream that they are captured on."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.graphs: weakref.WeakSet[Handle] = weakref.WeakSet()
        self.token: Any = None
        self.last: Handle | None = None  # released, but the memory behind the token hangs on it


class CudaRecorder:
    """Records with a `torch.cuda.CUDAGraph`.

    Graphs replayed on one stream run one after another; of what a body allocates only the output
    is read after it, before the next replay: so they share one pool. What runs before a capture
    runs on its stream: cuBLAS keeps a workspace for every stream that it has seen.
    """

    _turn = threading.Lock()  # torch captures one graph at a time in a process
    _released: ClassVar[deque[Callable[[], None]]] = deque()
    _streams: ClassVar[dict[Any, Any]] = {}  # for captures, by device and stream: for all recorders

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

    def warm_up(self, body: Body, device: torch.device) -> Tensor:
        """Run it on the capture's stream, so that Triton has compiled and cuBLAS its workspace.

        The output is that of one more run, on the current stream.
        """
        with self._turn, torch.cuda.device(device):
            current, side = torch.cuda.current_stream(device), self._pool(device).stream
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    body()
            current.wait_stream(side)
        self._sweep()
        return body()

    def capture(self, body: Body, device: torch.device) -> Recording:
        """Record it without running it; where that fails, nothing is left of the attempt.

        Not with `torch.cuda.graph`, which waits for the device and empties the allocator's cache:
        the next full step would have to ask the driver for its memory again.
        """
        try:
            with self._turn, torch.cuda.device(device):
                pool = self._pool(device)
                if not pool.graphs and pool.last is None:
                    pool.token = torch.cuda.graph_pool_handle()
                graph = torch.cuda.CUDAGraph()
                try:
                    with torch.cuda.stream(pool.stream):
                        with _random_state_aside(device):
                            graph.capture_begin(pool.token, capture_error_mode="thread_local")
                        try:
                            output = body()
                        finally:
                            graph.capture_end()
                except BaseException:
                    self._undo(graph, pool, device)
                    raise
                pool.graphs.add(graph)
                pool.last = None
        finally:
            self._sweep()
        return Recording(graph, output)

    def release(self, handle: Handle) -> None:
        """Give its memory back, but not while a capture counts on the pool.

        It may be called at any moment, by the garbage collector too, so it waits for nobody.
        """
        self._released.append(partial(self._reset, handle))
        self._sweep()

    def _pool(self, device: torch.device) -> _Pool:
        where = device, self.stream(device)
        if where not in self._pools:
            if where not in self._streams:
                self._streams[where] = torch.cuda.Stream(device)
            self._pools[where] = _Pool(self._streams[where])
        return self._pools[where]

    def _undo(self, graph: torch.cuda.CUDAGraph, pool: _Pool, device: torch.device) -> None:
        """After a capture that raised: the graph and its pool are of no use any more."""
        graph.reset()
        del self._pools[device, self.stream(device)]
        # after a capture that CUDA broke off, the allocator would go on recording
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index, pool.token)
            torch._C._cuda_releasePool(device.index, pool.token)

    @classmethod
    def _sweep(cls) -> None:
        """Reset what was released, unless a capture is under way, which then does it at its end.

        The last graph of a pool is kept until there is another one, and the pool's memory with it:
        else each generation would take new memory, which torch gives back when it runs short only.
        """
        while cls._released and cls._turn.acquire(blocking=False):
            try:
                with suppress(IndexError):  # another thread was faster
                    cls._released.popleft()()
            finally:
                cls._turn.release()

    def _reset(self, handle: Handle) -> None:
        for pool in self._pools.values():
            if handle in pool.graphs:
                pool.graphs.discard(handle)
                if not pool.graphs:
                    pool.last = handle
                    return
        handle.reset()
