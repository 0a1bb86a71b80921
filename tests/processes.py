"""Several processes at one piece of work, forked from the test's own: no import is paid twice."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)
LIMIT = 300  # seconds after which a process that hangs is ended


def launch(size: int, work: Callable[[int], object], folder: Path) -> list[tuple[int, str]]:
    """Run `work(rank)` in so many processes that a launcher's environment describes.

    Returns each one's exit status and what it wrote to stderr; what they printed is dropped.
    """
    port = _free_port()
    context = multiprocessing.get_context("fork")
    told = [folder / f"stderr-{rank}" for rank in range(size)]
    processes = [
        context.Process(target=_run, args=(rank, size, port, work, told[rank]))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
    codes = [-1 if process.exitcode is None else process.exitcode for process in processes]
    return [(code, path.read_text()) for code, path in zip(codes, told, strict=True)]


def _run(rank: int, size: int, port: int, work: Callable[[int], object], told: Path) -> None:
    torch.set_num_threads(1)  # a forked process must not wait for threads that it does not have
    os.environ |= environment(rank, size, port)
    # Open until the process ends: what it died of is written last.
    sys.stderr, sys.stdout = open(told, "w"), open(os.devnull, "w")  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    os.dup2(sys.stdout.fileno(), 1)
    work(rank)


def environment(rank: int, size: int, port: int = 29500) -> dict[str, str]:
    """What a launcher tells a process."""
    return {
        "RANK": f"{rank}",
        "WORLD_SIZE": f"{size}",
        "LOCAL_RANK": f"{rank}",
        "LOCAL_WORLD_SIZE": f"{size}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": f"{port}",
    }


def command(*args: object) -> Callable[[int], None]:
    """`lesa ARGS`, to be run by every process."""
    from lesa.cli import app

    words: Sequence[str] = [str(arg) for arg in args]
    return lambda rank: app(words)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
