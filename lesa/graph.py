"""CUDA graphs of skipped steps: recorded once, replayed by whoever holds the lease.

A *body* is a function without arguments that reads static buffers and weights and overwrites one
static output. It may run any number of times over, so it writes nothing that it reads. The life of
its graph, one arrow per `Lease.run`:

    absent -> warm -> captured -> captured ...
                  \\-> refused: CUDA does not record it, so it runs eagerly
    the weights changed, in any state -> absent
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from enum import Enum
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lesa import ranges
from lesa.swap import Listener, Tap

__all__ = ["Buffers", "CudaRecorder", "GraphKey", "Lease", "State", "StepGraphs",
           "refusal", "signature"]  # fmt: skip

# What PEFT's layers keep outside their parameters, and a graph would bake in.
_ADAPTER = ("scaling", "merged_adapters", "_active_adapter", "_disable_adapters")
_MOVING = ("group_offloading", "lazy_prefetch_group_offloading", "layerwise_casting")
_WARM_UPS = 3

Body = Callable[[], object]


class GraphKey(NamedTuple):
    """What a graph bakes in besides the weights, whose `signature` is compared at every step.

    `shape`, `dtype` and `device` are the feature's, `history` is K, and `variant` is whatever else
    tells one body from another, such as a bias or a feature that is written out.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    branch: str
    history: int
    num_steps: int
    variant: Hashable = ()


class Buffers(Protocol):
    """The static tensors of one body; `reset` forgets what the last generation left in them."""

    output: Tensor

    @property
    def nbytes(self) -> int: ...

    def reset(self) -> None: ...


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


class State(Enum):
    """How far a graph is."""

    ABSENT = "absent"
    WARM = "warm"
    CAPTURED = "captured"
    REFUSED = "refused"


B = TypeVar("B", bound=Buffers)


class _Entry(Generic[B]):
    """A body with its buffers, the weights that it was made for, and its graph."""

    body: Body

    def __init__(self, key: GraphKey, stream: int, buffers: B, recorder: Recorder) -> None:
        self.key, self.stream, self.buffers, self.recorder = key, stream, buffers, recorder
        self.state = State.ABSENT
        self.reason: str | None = None
        self.handle: Handle | None = None
        self.weights: tuple[Any, ...] | None = None
        self.leased = True

    def make(self, make_body: Callable[[B], Body], weights: tuple[Any, ...]) -> None:
        """A body for these weights."""
        with torch.inference_mode(False), torch.no_grad():  # so that either mode may write them
            self.body = make_body(self.buffers)
        self.weights = weights

    def drop(self) -> bool:
        """Back to absent; whether there was a graph."""
        handle, self.handle = self.handle, None
        self.state, self.reason = State.ABSENT, None
        if handle is not None:
            self.recorder.release(handle)
        return handle is not None

    def advance(self) -> None:
        """Run one step."""
        if self.handle is not None:
            with ranges.replay:
                self.handle.replay()
        elif self.state is State.ABSENT:
            self.recorder.warm_up(self.body, self.key.device)
            self.state = State.WARM
        else:
            self.body()

    def capture(self) -> str:
        """Record the body; which of `StepGraphs.counts` it is."""
        try:
            with ranges.capture:
                self.handle = self.recorder.capture(self.body, self.key.device)
        except Exception as error:  # remembered; the step is run eagerly
            what = str(error).partition("\n")[0]
            self.state = State.REFUSED
            self.reason = f"capture failed: {type(error).__name__}: {what}"
            return "failed"
        self.state = State.CAPTURED
        return "captured"


class Lease(Generic[B]):
    """One trajectory's right to an entry, which ends with `release()` or with the lease itself.

    Attributes:
        buffers: to be filled before `run`; nobody else writes them meanwhile.
        release: gives the entry back.
    """

    def __init__(
        self,
        graphs: StepGraphs[B],
        entry: _Entry[B],
        modules: tuple[nn.Module, ...],
        make_body: Callable[[B], Body],
        refused: str | None,
    ) -> None:
        self.buffers = entry.buffers
        self._graphs, self._entry, self._modules = graphs, entry, modules
        self._make_body, self._refused = make_body, refused
        # No lock: the garbage collector may end a lease while this thread holds one.
        self.release = weakref.finalize(self, setattr, entry, "leased", False)
        self.release.atexit = False

    @property
    def state(self) -> State:
        """How far the graph is."""
        return self._entry.state

    @property
    def reason(self) -> str | None:
        """Why `run` computes eagerly, or None where it replays or is about to."""
        return self._refused or self._entry.reason

    def run(self) -> Tensor:
        """The output of one step, from the buffers and the weights as they are now.

        Raises whatever the body raises; the entry then goes when the lease does.
        """
        assert self.release.alive, "the lease has ended"
        entry, weights = self._entry, signature(self._modules)
        try:
            if weights != entry.weights:
                self._renew(weights)
            if self._refused is not None:
                entry.body()
            else:
                if entry.state is State.WARM:
                    self._graphs.count(entry.capture())
                entry.advance()
        except BaseException:
            entry.weights = None
            raise
        # A clone: the next replay overwrites the output, and the pipeline may still hold this one.
        return entry.buffers.output.clone()

    def _renew(self, weights: tuple[Any, ...]) -> None:
        entry, graphs = self._entry, self._graphs
        if entry.drop():
            graphs.count("invalidated")
        device, recorder = entry.key.device, entry.recorder
        self._refused = self._refused or refusal(self._modules, device, recorder=recorder)
        entry.make(self._make_body, weights)


class StepGraphs(Generic[B]):
    """The graphs of one controller, least recently used first; for any number of threads.

    No two leases share buffers: a second trajectory of the same key gets an entry of its own, or,
    where all are lent out, one outside the cache that runs eagerly. `counts` holds how many graphs
    were "captured", "failed" to be, were "invalidated" by new weights, and "evicted".
    """

    def __init__(self, maximum: int = 8, recorder: Recorder | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self._maximum = maximum
        self._recorder: Recorder = recorder or CudaRecorder()
        self._entries: list[_Entry[B]] = []
        self._lock = threading.Lock()

    def acquire(
        self,
        key: GraphKey,
        modules: Iterable[nn.Module],
        make_buffers: Callable[[], B],
        make_body: Callable[[B], Body],
        *,
        model: nn.Module | None = None,
    ) -> Lease[B]:
        """A lease on an entry of `key` whose buffers are new or were reset.

        Args:
            modules: those whose weights the body reads, also in values derived from them.
            make_buffers: makes the static tensors, on `key.device`.
            make_body: makes the body over them, anew when the weights have changed: the place to
                derive values from weights. The body is kept for later leases of the same key, so
                it must not refer to the trajectory.
            model: the whole denoiser, on which offloading may hang its hook.
        """
        modules, recorder = tuple(modules), self._recorder
        weights, stream = signature(modules), recorder.stream(key.device)
        refused = refusal(modules, key.device, recorder=recorder, model=model)
        with self._lock:
            entry = self._reuse(key, stream, weights)
            if entry is None:
                room = self._make_room()
                with torch.inference_mode(False), torch.no_grad():
                    entry = _Entry(key, stream, make_buffers(), recorder)
                entry.make(make_body, weights)
                if room:
                    self._entries.append(entry)
                else:
                    refused = refused or f"all {self._maximum} graphs are in use"
        return Lease(self, entry, modules, make_body, refused)

    @property
    def nbytes(self) -> int:
        """Bytes of all static buffers; what bodies allocate inside a graph comes on top."""
        with self._lock:
            return sum(entry.buffers.nbytes for entry in self._entries)

    def clear(self) -> None:
        """Forget all graphs and buffers; those that are lent out go with their leases."""
        with self._lock:
            entries, self._entries = self._entries, []
            for entry in entries:
                if not entry.leased:
                    entry.drop()

    def count(self, event: str) -> None:
        """One more of `counts`."""
        with self._lock:
            self.counts[event] += 1

    def _reuse(self, key: GraphKey, stream: int, weights: tuple[Any, ...]) -> _Entry[B] | None:
        """A free entry of this key, now the most recently used; those of other weights go."""
        free = [e for e in self._entries if not e.leased and (e.key, e.stream) == (key, stream)]
        for entry in free:
            self._entries.remove(entry)
            if entry.weights == weights:
                self._entries.append(entry)
                entry.buffers.reset()
                entry.leased = True
                return entry
            self.counts["invalidated"] += entry.drop()
        return None

    def _make_room(self) -> bool:
        """Whether one more entry fits, if need be in the place of the oldest free one."""
        if len(self._entries) < self._maximum:
            return True
        oldest = next((entry for entry in self._entries if not entry.leased), None)
        if oldest is None:
            return False
        self._entries.remove(oldest)
        self.counts["evicted"] += 1
        oldest.drop()
        return True


def signature(modules: Iterable[nn.Module]) -> tuple[Any, ...]:
    """What a graph takes for granted about modules; compared before every replay.

    The memory, version, dtype, device and layout of each parameter and buffer, the identity, class
    and mode of each module, and the state of PEFT's adapters: read from the tensors themselves, so
    a change that failed half way shows too. A write through `.data` to the same memory does not: a
    replay reads the new values, but what `make_body` derived from the old ones stays.
    """
    found: list[Any] = []
    pending: list[nn.Module | None] = list(modules)
    for module in pending:  # grows on the way
        if module is None:
            continue
        own = vars(module)
        found += (id(module), type(module), own["training"])
        found += [_frozen(own[name]) for name in _ADAPTER if name in own]
        found += [_frozen(tensor) for tensor in own["_parameters"].values()]
        found += [_frozen(tensor) for tensor in own["_buffers"].values()]
        pending += own["_modules"].values()
    return tuple(found)


def _frozen(value: Any) -> Any:
    """A copy that compares by value; of a tensor, where its values lie."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):  # quantised or sharded: a shell around others
            return tuple(_frozen(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        version = 0 if value.is_inference() else value._version
        return value.data_ptr(), version, value.dtype, value.device, value.shape, value.stride()
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in value.items())
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


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
