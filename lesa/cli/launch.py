"""Commands in several processes, as torchrun and `accelerate launch` start them."""

from __future__ import annotations

import secrets
from math import ceil
from pathlib import Path

from lesa.errors import LesaError
from lesa.util.ranks import RankError, Ranks, launched

__all__ = ["check_ranks", "leads", "refuse_ranks", "require_shared", "speaks"]


def leads() -> bool:
    """Whether this process is the one that speaks for all, as far as the launcher says."""
    try:
        return launched().rank == 0
    except LesaError:
        return True


def speaks(error: LesaError) -> bool:
    """Whether this process tells of an error: what stops all before they are joined is told once on
    each machine, later every rank speaks for itself."""
    try:
        return isinstance(error, RankError) or launched().local == 0
    except LesaError:
        return True


def refuse_ranks(command: str) -> None:
    """LesaError where a command that is one process's was started in several."""
    if (size := launched().size) > 1:
        raise LesaError(
            f"WORLD_SIZE={size}: lesa {command} runs in one process; start it without a launcher"
        )


def check_ranks(prompts: int, batch_size: int, device: str | None) -> None:
    """LesaError where a process of a launch would have no batch, or no device, of its own."""
    own = launched()
    if own.size == 1:
        return
    batches = ceil(prompts / batch_size)
    if batches < own.size:
        given = f"{prompts} prompts at batch-size={batch_size} are {batches} batches"
        smaller = f", or give --batch-size {prompts // own.size}" * (prompts >= own.size)
        raise LesaError(
            f"WORLD_SIZE={own.size}: {given}, so that a process would have none; start at most "
            f"{batches} processes{smaller}"
        )
    _check_devices(own.size, own.local_size, device)


def _check_devices(size: int, local_size: int, device: str | None) -> None:
    """Every process takes the GPU of its LOCAL_RANK."""
    from lesa.cli.inputs import default_device

    named = device or default_device()
    kind, _, number = named.partition(":")
    if number and kind != "cpu":
        raise LesaError(
            f"device={named!r}: all of WORLD_SIZE={size} processes would take it; give {kind}, of "
            "which each takes one of its own"
        )
    if kind == "cuda":
        import torch

        if (there := torch.cuda.device_count()) < local_size:
            raise LesaError(
                f"WORLD_SIZE={size}: {local_size} processes on a machine with {there} GPUs; start "
                f"at most {there} there, or give --device cpu"
            )


def require_shared(folder: Path, ranks: Ranks) -> None:
    """LesaError, on every rank, where one of them does not see what the first writes there."""
    mark = folder / f".lesa-{secrets.token_hex(8)}.part"
    if ranks.leads:
        mark.touch()
    name = ranks.told(mark.name)
    seen = ranks.everyone((folder / name).exists())
    if ranks.leads:
        mark.unlink()
    if not all(seen):
        raise LesaError(
            f"out={str(folder)!r}: it is another folder for rank {seen.index(False)} of "
            f"{ranks.size}; give one that all machines share"
        )
