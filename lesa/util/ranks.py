"""The processes that torchrun or `accelerate launch` has started for one piece of work."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from lesa.errors import LesaError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Launched", "RankError", "Ranks", "joined", "launched"]

Item = TypeVar("Item")
Value = TypeVar("Value")
PATIENCE = timedelta(days=1)  # the launcher ends all where one dies: no wait needs to be short
_LAUNCH = "start by torchrun or accelerate launch, or unset"


class RankError(LesaError):
    """What stopped one rank while others were at work; its text names the rank."""


@dataclass(frozen=True)
class Launched:
    """What the launcher says of this process: its number, on all machines and on this one."""

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1


def launched(environment: Mapping[str, str] | None = None) -> Launched:
    """This process among those that were started together, from the environment; alone without.

    Raises: LesaError for numbers that contradict each other, as where some are missing.
    """
    known = os.environ if environment is None else environment
    if known.get("WORLD_SIZE", "1") == "1":
        return Launched()
    size = _number(known, "WORLD_SIZE", 1)
    rank = _number(known, "RANK", 0, size)
    local_size = _number(known, "LOCAL_WORLD_SIZE", 1, size + 1, size)
    local = _number(known, "LOCAL_RANK", 0, local_size, rank % local_size)
    return Launched(rank, size, local, local_size)


def _number(
    known: Mapping[str, str], name: str, least: int, end: int | None = None, default: Any = None
) -> int:
    text = known.get(name, default)
    try:
        found = int(str(text))
    except ValueError:
        found = least - 1
    if found < least or (end is not None and found >= end):
        size = known.get("WORLD_SIZE")
        told = f"{name}={text}: no number of one of WORLD_SIZE={size} processes"
        raise LesaError(f"{told}; {_LAUNCH} WORLD_SIZE")
    return found


@dataclass(frozen=True)
class Ranks:
    """Processes that share work, each with a whole pipeline of its own; one of them by default.

    Attributes:
        rank: of this process among them.
        size: how many there are.
        group: of torch.distributed, on whose ranks tensors are exchanged; None where one is alone.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def of(cls, group: Any) -> Ranks:
        """The ranks of a process group; alone for None.

        Raises: LesaError for what is no group, or one that this process does not belong to.
        """
        if group is None:
            return cls()
        import torch.distributed as dist

        try:
            rank, size = dist.get_rank(group), dist.get_world_size(group)
        except (ValueError, RuntimeError, AttributeError, TypeError):
            rank = size = -1
        if rank < 0:
            raise LesaError(
                f"group={type(group).__name__}: no process group that this process belongs to; "
                "pass torch.distributed.group.WORLD after init_process_group"
            )
        return cls(rank, size, group) if size > 1 else cls()

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and speaks for all."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Those of this rank: every `size`-th."""
        return items[self.rank :: self.size]

    def told(self, value: Value) -> Value:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        self._met(lambda: dist.broadcast_object_list(box, group=self.group, group_src=0))
        return box[0]

    def everyone(self, value: Value) -> list[Value]:
        """Every rank's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        self._met(lambda: dist.all_gather_object(found, value, group=self.group))
        return found

    def assemble(self, parts: Tensor) -> Tensor:
        """In place: what every rank has written into its own part, to the bit.

        Everything else must be zero there; `parts` is contiguous.
        """
        if self.size > 1 and parts.numel():
            import torch
            import torch.distributed as dist

            flat = parts.view(-1).view(torch.uint8)  # bytes add to zero bytes without rounding
            self._met(lambda: dist.all_reduce(flat, group=self.group))
        return parts

    def same(self, tensors: Sequence[Tensor]) -> None:
        """In place: the first rank's values on every rank; sent only where they differ at all."""
        if self.size == 1:
            return
        import torch

        digest = hashlib.sha256()
        for tensor in tensors:
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(flat.numpy().tobytes())
        if len({*self.everyone(digest.digest())}) > 1:
            first = self.told([tensor.cpu() for tensor in tensors] if self.leads else None)
            assert first is not None
            for mine, known in zip(tensors, first, strict=True):
                mine.copy_(known)

    def wait(self) -> None:
        """Until every rank is here."""
        self.everyone(None)

    def _met(self, meet: Callable[[], Any]) -> None:
        try:
            meet()
        except RuntimeError as error:
            raise LesaError(
                f"another of {self.size} processes has ended ({_first(error)}); start again, which "
                "goes on from what is finished"
            ) from None


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes of one launch, connected by torch.distributed; alone without a launcher.

    Raises: RankError for a mistake that one of several processes meets.
    """
    own = launched()
    if own.size == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    _connect(own)
    try:
        yield Ranks(own.rank, own.size, dist.group.WORLD)
    except LesaError as error:
        raise RankError(f"rank {own.rank}: {error}") from error
    finally:
        dist.destroy_process_group()


def _connect(own: Launched) -> None:
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(own.local % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, rank=own.rank, world_size=own.size, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        told = f"WORLD_SIZE={own.size}: the processes find no way to each other ({_first(error)})"
        raise LesaError(f"{told}; {_LAUNCH} WORLD_SIZE") from error


def _first(error: BaseException) -> str:
    """The first line of an error, for a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120].rstrip(" .")
