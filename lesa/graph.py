"""CUDA graphs of skipped steps: recorded once, replayed by whoever holds the lease.

A *body* is a function without arguments that reads static buffers and weights and overwrites one
static output. It may run any number of times over, so it writes nothing that it reads. The life of
its graph, one arrow per `Lease.run`:

    absent -> warm -> captured -> captured ...
                  \\-> refused: CUDA does not record it, so it runs eagerly
    the weights changed, in any state -> absent
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from enum import Enum
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lesa import ranges
from lesa.recorder import Body, CudaRecorder, Handle, Recorder, refusal
from lesa.signature import signature

__all__ = ["Buffers", "GraphKey", "Lease", "State", "StepGraphs"]


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
            if entry.drop():
                self.counts["invalidated"] += 1
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
