"""CUDA graphs of skipped steps: recorded for one trajectory, replayed by it, and gone with it.

A *body* is a function without arguments that reads static buffers and weights and returns one new
tensor. It may run any number of times over, so it writes nothing that it reads. The life of its
graph, one arrow per `Lease.run`:

    absent -> warm -> captured -> captured ...
                  \\-> refused: CUDA does not record it, so it runs eagerly
    the weights changed, in any state -> absent

A graph has the addresses of its buffers baked in, the ring among them. So both end with the lease,
or the cache would lie in memory while a picture is decoded; what stays is the knowledge that a body
of this kind is warm, or refused. A later trajectory begins there and captures at its first step.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from enum import Enum
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lesa.engine import nvtx_ranges
from lesa.engine.graphs.capture import Body, CudaRecorder, Recorder, Recording
from lesa.engine.graphs.refusal import refusal
from lesa.engine.graphs.weights_state import signature

__all__ = ["GraphKey", "Lease", "State", "StepGraphs"]


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


class State(Enum):
    """How far a graph is."""

    ABSENT = "absent"
    WARM = "warm"
    CAPTURED = "captured"
    REFUSED = "refused"


_MAX_KNOWN = 256

B = TypeVar("B")


class _Known(NamedTuple):
    """How far the last trajectory of a key came, with which weights."""

    weights: tuple[Any, ...]
    reason: str | None


class _Graph:
    """What the finalizer of a lease must reach without reaching the lease."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.recording: Recording | None = None

    def drop(self) -> bool:
        """Give the graph's memory back; whether there was one."""
        recording, self.recording = self.recording, None
        if recording is not None:
            self.recorder.release(recording.handle)
        return recording is not None


class Lease(Generic[B]):
    """One trajectory's buffers and graph; both go with `release()` or with the lease itself.

    Attributes:
        buffers: to be filled before `run`.
        state: how far the graph is.
    """

    def __init__(
        self,
        graphs: StepGraphs[B],
        key: GraphKey,
        modules: tuple[nn.Module, ...],
        buffers: B,
        make_body: Callable[[B], Body],
        refused: str | None,
    ) -> None:
        self.buffers, self.state = buffers, State.ABSENT
        self._graphs, self._key, self._modules = graphs, key, modules
        self._make_body, self._refused = make_body, refused
        self._failed: str | None = None
        self._body: Body | None = None
        self._weights: tuple[Any, ...] | None = None
        self._graph = _Graph(graphs.recorder)
        # May come at any moment, also while this thread holds a lock: `drop` waits for none.
        self._end = weakref.finalize(self, self._graph.drop)
        self._end.atexit = False

    @property
    def reason(self) -> str | None:
        """Why `run` computes eagerly, or None where it replays or is about to."""
        return self._refused or self._failed

    def release(self) -> None:
        """Let go of the buffers and of the graph over them; `run` is over."""
        self._end()
        self._body = None
        del self.buffers

    def run(self) -> Tensor:
        """The output of one step, from the buffers and the weights as they are now.

        Raises whatever the body raises; the graph is then made anew at the next step.
        """
        assert self._end.alive, "the lease has ended"
        weights = signature(self._modules)
        try:
            if self._weights != weights:
                self._renew(weights)
            return self._advance()
        except BaseException:
            self._weights = None
            raise

    def _advance(self) -> Tensor:
        body, graph, device = self._body, self._graph, self._key.device
        assert body is not None
        if self._refused is None and self.state is State.ABSENT:
            output = graph.recorder.warm_up(body, device)
            self._become(State.WARM)
            return output
        if self._refused is None and self.state is State.WARM:
            self._capture(body)
        if graph.recording is None:
            return body()
        with self._graphs.turn, nvtx_ranges.replay:
            graph.recording.handle.replay()
            # A clone: the next replay overwrites it, and samplers keep outputs of several steps.
            return graph.recording.output.clone()

    def _capture(self, body: Body) -> None:
        graph = self._graph
        try:
            with nvtx_ranges.capture:
                graph.recording = graph.recorder.capture(body, self._key.device)
        except Exception as error:  # remembered; the step is run eagerly
            what = str(error).partition("\n")[0]
            self._become(State.REFUSED, f"capture failed: {type(error).__name__}: {what}")
            self._graphs.count("failed")
        else:
            self._become(State.CAPTURED)
            self._graphs.count("captured")

    def _renew(self, weights: tuple[Any, ...]) -> None:
        """A body for these weights, and where it begins."""
        if self._graph.drop():
            self._graphs.count("invalidated")
        if self._body is not None:
            self._refused = self._refused or self._graphs.refusal(self._modules, self._key)
        with torch.inference_mode(False), torch.no_grad():  # so that either mode may write them
            self._body = self._make_body(self.buffers)
        self._weights = weights
        self.state, self._failed = self._graphs.known(self._key, weights)

    def _become(self, state: State, reason: str | None = None) -> None:
        self.state, self._failed = state, reason
        assert self._weights is not None
        self._graphs.note(self._key, _Known(self._weights, reason))


class StepGraphs(Generic[B]):
    """The graphs of one controller, for any number of threads.

    No two leases share buffers or a graph. `counts` holds how many graphs were "captured", "failed"
    to be, and were "invalidated" by new weights.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self.recorder: Recorder = recorder or CudaRecorder()
        self.turn = threading.Lock()  # graphs share memory: one replay and the copy of its output
        self._known: dict[tuple[GraphKey, int], _Known] = {}
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
        """A lease with buffers of its own.

        Args:
            modules: those whose weights the body reads, also in values derived from them.
            make_buffers: makes the static tensors, on `key.device`.
            make_body: makes the body over them, anew when the weights have changed: the place to
                derive values from weights.
            model: the whole denoiser, on which offloading may hang its hook.
        """
        modules = tuple(modules)
        refused = self.refusal(modules, key, model)
        with torch.inference_mode(False), torch.no_grad():  # so that either mode may write them
            buffers = make_buffers()
        return Lease(self, key, modules, buffers, make_body, refused)

    def refusal(
        self, modules: Iterable[nn.Module], key: GraphKey, model: nn.Module | None = None
    ) -> str | None:
        """Why nothing is to be recorded now, or None."""
        return refusal(modules, key.device, recorder=self.recorder, model=model)

    def count(self, event: str) -> None:
        """One more of `counts`."""
        with self._lock:
            self.counts[event] += 1

    def known(self, key: GraphKey, weights: tuple[Any, ...]) -> tuple[State, str | None]:
        """Where a lease of this key begins: warm or refused, if one with these weights was."""
        found = self._known.get((key, self.recorder.stream(key.device)))
        if found is None or found.weights != weights:
            return State.ABSENT, None
        return (State.WARM, None) if found.reason is None else (State.REFUSED, found.reason)

    def note(self, key: GraphKey, known: _Known) -> None:
        """How far a lease of this key came."""
        with self._lock:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[key, self.recorder.stream(key.device)] = known
