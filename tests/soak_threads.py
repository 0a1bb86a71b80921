"""Many generations at once: threads that share a denoiser, and processes forked in between."""

from __future__ import annotations

import copy
import faulthandler
import os
import re
import signal
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from random import Random
from typing import IO, Any

import torch
from soak_requests import METHODS, NAMES, Pipelines, Request, draw_request, quiet, serve

import lesa

FORK_SECONDS = 30  # that a child may take for one picture
_LOCAL = ("raise", "interrupt", "latents", None, None)  # events that a thread may see


def threads(count: int, each: int, rounds: int, seed: int = 0) -> dict[str, Any]:
    """`rounds` times so many threads make `each` pictures, each on a pipeline of its own.

    A round has one enabled denoiser, and every picture is compared with that of one thread alone.
    """
    random, pipes = Random(seed), Pipelines.load()
    runs, differ, fallbacks = 0, [], Counter[str]()
    for number in range(rounds):
        name, method = NAMES[number % len(NAMES)], random.choice([*METHODS])
        jobs = [[_request(random, name, method) for _ in range(each)] for _ in range(count)]
        with _accelerated(pipes, name, method) as pipe:
            alone = [[serve(_own(pipes, name), request) for request in job] for job in jobs]
            together = _together([_worker(_own(pipes, name), job) for job in jobs])
            fallbacks.update(lesa.stats(pipe).fallbacks)
        for job, first, second in zip(jobs, alone, together, strict=True):
            runs += len(job)
            pairs = zip(job, first, second or [""] * each, strict=True)
            differ += [str(request) for request, a, b in pairs if a != b]
    return {"threads": count, "runs": runs, "differ": differ, "fallbacks": dict(fallbacks)}


def forks(rounds: int, seed: int = 0) -> dict[str, Any]:
    """`rounds` processes are forked while two threads are in the middle of their runs.

    Each child makes one picture on the pipeline that the threads' are siblings of. That is the tiny
    one, which is given embeddings: a tokenizer that another thread uses at the fork stays locked.
    """
    random, ended = Random(seed), Counter[str]()
    pipes = Pipelines.load()
    with _one_thread():
        for _ in range(rounds):
            name, method = "sdxl", random.choice([*METHODS])
            wanted = replace(_request(random, name, method), event=None)
            with _accelerated(pipes, name, method):
                expected = serve(pipes, wanted)
                others = [_request(random, name, method) for _ in range(2)]
                picture = partial(serve, pipes, wanted)
                with _busy(pipes, name, others), tempfile.TemporaryFile("w+") as trace:
                    time.sleep(random.uniform(0, 0.2))
                    ended[_child(picture, expected, trace)] += 1
    return {"forks": rounds, "ended": dict(ended)}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in the same order in a child: OpenMP's own threads do not survive a fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _request(random: Random, name: str, method: str) -> Request:
    """One for this pipeline that any thread may serve."""
    while True:
        request = draw_request(random, [method])
        if request.name == name and not request.loop:  # a loop of one's own names no scheduler
            event = random.choice(_LOCAL)
            # a scheduler that draws from the process's one source of noise is not for threads
            scheduler = "own" if request.scheduler == "stochastic" else request.scheduler
            return replace(request, method=method, event=event, scheduler=scheduler)


@contextmanager
def _accelerated(pipes: Pipelines, name: str, method: str) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with lesa.accelerate(pipes.made[name], **METHODS[method]) as pipe:
            yield pipe


def _own(pipes: Pipelines, name: str) -> Pipelines:
    """The same denoiser in a pipeline with a scheduler of its own, and tokenizers, whose padding is
    a state that two threads would share."""
    pipe = pipes.made[name]
    own = {"scheduler": type(pipes.own[name]).from_config(pipes.own[name].config)}
    own |= {
        part: copy.deepcopy(value) for part, value in pipe.components.items() if "token" in part
    }
    made = pipes.made | {name: quiet(type(pipe).from_pipe(pipe, **own))}
    return Pipelines(made, pipes.trained)


def _worker(pipes: Pipelines, job: list[Request]) -> Callable[[], list[str]]:
    return lambda: [serve(pipes, request) for request in job]


def _together(workers: list[Callable[[], list[str]]]) -> list[list[str] | None]:
    """What each returned; None of one that raised."""
    results: list[list[str] | None] = [None] * len(workers)
    start = threading.Barrier(len(workers))

    def work(number: int) -> None:
        start.wait()
        results[number] = workers[number]()

    running = [threading.Thread(target=work, args=(number,)) for number in range(len(workers))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return results


@contextmanager
def _busy(pipes: Pipelines, name: str, job: list[Request]) -> Iterator[None]:
    """Threads that make one picture after another for the length of a `with` block."""
    over = threading.Event()

    def work(own: Pipelines, request: Request) -> None:
        while not over.is_set():
            serve(own, request)

    running = [threading.Thread(target=work, args=(_own(pipes, name), each)) for each in job]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in running:
            thread.join()


def _child(picture: Callable[[], str], expected: str, trace: IO[str]) -> str:
    """How a forked process ended: "equal", "differs", "raised" or where it hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks among threads
        child = os.fork()
    if child == 0:  # nothing of the parent's may run here
        status = 2
        try:
            faulthandler.dump_traceback_later(FORK_SECONDS / 2, file=trace)
            status = 0 if picture() == expected else 1
        finally:
            os._exit(status)
    end, ended, status = time.monotonic() + FORK_SECONDS, 0, 0
    while not ended and time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        trace.seek(0)
        return "hangs at " + " < ".join(re.findall(r'(\w+\.py", line \d+)', trace.read())[:6])
    return ("equal", "differs", "raised")[min(os.waitstatus_to_exitcode(status) % 256, 2)]
