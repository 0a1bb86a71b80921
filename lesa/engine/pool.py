"""Memory for the rings of many requests, up to a limit."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lesa.util.forks import renew_in_children

__all__ = ["Lease", "Pool", "PoolState"]

# A ring is in use as long as the others had fewer calls than this each since its own last one: a
# generation has about a hundred. Whose request went away without a word is not used again.
_GRACE = 128

_Key = tuple[int, torch.Size, torch.dtype, torch.device, int]


class PoolState(NamedTuple):
    """Bytes of rings at work, of memory that waits for the next ring, and the limit, 0 without one;
    how many rings were taken from requests that had stopped, and how many found no room."""

    used: int
    idle: int
    limit: int
    evicted: int
    refused: int


class _Ended(NamedTuple):
    """A lease that is over: its memory, if the pool may give that to another one."""

    token: int
    nbytes: int
    key: _Key
    data: Tensor | None


class Pool:
    """Memory of rings.

    Without a limit it counts only: a ring's memory goes back to PyTorch at its last skipped step.
    With a limit that memory waits here for the next ring of the same layout, the oldest one makes
    room first. Where that is not enough, the ring that was used longest ago is taken from its
    request, if that has stopped; a ring in use is not.

    Args:
        limit: bytes of all rings together, or None.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.calls = 0
        self._used = self._idle_bytes = self._evicted = self._refused = 0
        self._live: dict[int, weakref.ref[Lease]] = {}
        self._idle: OrderedDict[int, _Ended] = OrderedDict()
        # A lease may end at any moment, also while this thread is in here: it only appends.
        self.ended: deque[_Ended] = deque()
        self.renew()
        renew_in_children(self)

    def renew(self) -> None:
        """In a forked process: nobody else is in it."""
        self._lock = threading.Lock()

    def state(self) -> PoolState:
        """What it holds now."""
        with self._lock:
            self._settle()
            limit = self.limit or 0
            return PoolState(self._used, self._idle_bytes, limit, self._evicted, self._refused)

    def take(self, lease: Lease, key: _Key, nbytes: int) -> Tensor | None:
        """Memory [K, *shape], to be written before it is read; None where there is no room. What a
        device without memory raises leaves nothing counted."""
        with self._lock:
            self._settle()
            data = self._again(key)
            if data is None and not self._make_room(nbytes):
                self._refused += 1
                return None
            self._used += nbytes
            self._live[id(lease)] = weakref.ref(lease)
        if data is None:
            try:
                with torch.inference_mode(False):  # so that it can be written in either mode
                    data = torch.empty((key[0], *key[1]), dtype=key[2], device=key[3])
            except BaseException:
                self.ended.append(_Ended(id(lease), nbytes, key, None))
                raise
        return data

    def _settle(self) -> None:
        """Take note of the leases that are over."""
        while self.ended:
            ended = self.ended.popleft()
            self._used -= ended.nbytes
            self._live.pop(ended.token, None)
            if ended.data is not None:
                self._idle_bytes += ended.nbytes
                self._idle[ended.data.data_ptr()] = ended

    def _again(self, key: _Key) -> Tensor | None:
        """Idle memory of this layout."""
        for name in reversed(self._idle):
            if self._idle[name].key == key:
                return self._drop(name)
        return None

    def _drop(self, name: int) -> Tensor | None:
        ended = self._idle.pop(name)
        self._idle_bytes -= ended.nbytes
        return ended.data

    def _make_room(self, nbytes: int) -> bool:
        """Whether there is room, perhaps after some has been made."""
        if self.limit is None:
            return True
        while self._used + self._idle_bytes + nbytes > self.limit:
            if self._idle:
                self._drop(next(iter(self._idle)))
            elif not self._evict():
                return False
        return True

    def _evict(self) -> bool:
        """Take the ring that was used longest ago, if its request has stopped."""
        live = [lease for known in self._live.values() if (lease := known()) is not None]
        oldest = min(live, key=lambda lease: lease.used, default=None)
        if oldest is None or self.calls - oldest.used < _GRACE * len(live):
            return False
        before = self._used
        oldest.evict()
        self._settle()
        self._evicted += self._used < before
        return self._used < before


class Lease:
    """One trajectory's right to memory of a pool, until `end` or its own end.

    Args:
        pool: where the memory comes from.
        lose: called when the pool takes the memory back; holds the trajectory weakly.

    Attributes:
        used: at which call of the pool it was used last.
        lost: whether the pool has taken its memory.
    """

    __slots__ = ("__weakref__", "_ended", "_lose", "_pool", "lost", "used")

    def __init__(self, pool: Pool, lose: Callable[[], Any]) -> None:
        self._pool, self._lose = pool, lose
        self._ended: _Ended | None = None
        self.used, self.lost = 0, False
        self.touch()

    def touch(self) -> None:
        """Its request has made a call."""
        pool = self._pool
        self.used = pool.calls = pool.calls + 1

    def take(self, history: int, like: Tensor) -> Tensor | None:
        """Memory for a ring of K = `history` features like this one, or None."""
        key = history, like.shape, like.dtype, like.device, _stream(like.device)
        nbytes = history * like.numel() * like.element_size()
        data = self._pool.take(self, key, nbytes)
        if data is not None:
            self._ended = _Ended(id(self), nbytes, key, data if self._pool.limit else None)
        return data

    def end(self, *, again: bool = True) -> None:
        """Give the memory back. `again` tells that nobody reads it any more, so that another ring
        may have it."""
        ended, self._ended = self._ended, None
        if ended is not None:
            self._pool.ended.append(ended if again else ended._replace(data=None))

    def evict(self) -> None:
        """The pool takes the memory away, perhaps while another thread reads it once more."""
        self.lost = True
        self.end(again=False)
        self._lose()

    def __del__(self) -> None:
        self.end(again=False)


def _stream(device: torch.device) -> int:
    """Work on memory is in order within a stream alone."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
