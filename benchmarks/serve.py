"""Many requests in one process: `python benchmarks/serve.py --requests 1000`.

One asyncio loop serves mixed requests on the embedded FLUX: sizes, steps, budgets, guidance, some
cancelled. Four are in flight, and every step of one is followed by steps of others. Served by lesa
(without training, a `lesa.Slot` for each), by the plain pipeline, and by the pipeline with
diffusers' TaylorSeer cache, which has no budgets per request, and here one request after another,
as its state belongs to the pipeline. Latency is from the moment that a client asks until its
picture is decoded; prompts are encoded ahead. It is told in seconds and in seconds of this
process's own CPU time, which on a machine with other work is what an idle one would take.

Every picture of lesa is compared bit for bit with the one that the pipeline's own call makes alone.
The memory of the process is sampled; its slope is that of the second half. Writes serve.json.
Ends with status 1 where a picture differs, a request is lost, or memory is not given back.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from math import ceil, isfinite
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import psutil  # noqa: E402
import torch  # noqa: E402
from _environment import RESULTS, environment, write  # noqa: E402
from _flux_server import Flux, Kind, draw_kinds, plainly  # noqa: E402
from diffusers import TaylorSeerCacheConfig  # noqa: E402
from soak_run import slope  # noqa: E402
from torch import Tensor  # noqa: E402

import lesa  # noqa: E402
from lesa import testbed  # noqa: E402
from lesa.util.perceptual import psnr  # noqa: E402

MEMORY_LIMIT = 16 * 2**20


class Clients:
    """Those who ask: each waits for its picture, then asks for another one."""

    def __init__(
        self,
        kinds: list[Kind],
        options: argparse.Namespace,
        count: int,
        alone: dict[Kind, Tensor] | None = None,
    ) -> None:
        self.random = Random(options.seed)
        self.kinds, self.options, self.count = kinds, options, count
        self.asked = self.aborted = self.compared = self.differ = 0
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.alone = alone or {}
        self.pictures: dict[Kind, Tensor] = {}  # one of each kind: all of them would fill memory
        self.memory: list[tuple[int, int]] = []

    def run(self, server: Server) -> dict[str, Any]:
        """Serve them all; see `found`."""
        begun = time.perf_counter(), time.process_time()
        asyncio.run(self._all(server))
        return self._found(time.perf_counter() - begun[0], time.process_time() - begun[1])

    async def _all(self, server: Server) -> None:
        end = time.perf_counter() + self.options.seconds
        await asyncio.gather(*(self._client(server, end) for _ in range(self.options.in_flight)))

    async def _client(self, server: Server, end: float) -> None:
        while self.asked < self.count and time.perf_counter() < end:
            number, kind = self.asked, self.random.choice(self.kinds)
            abort = self.random.random() < self.options.aborts
            at = self.random.randrange(1, kind.steps) if abort else None
            self.asked += 1
            begun = time.perf_counter(), time.process_time()
            task = asyncio.create_task(server.serve(number, kind, at))
            try:
                picture = await task
            except asyncio.CancelledError:
                self.aborted += 1
                continue
            self.seconds.append(time.perf_counter() - begun[0])
            self.cpu_seconds.append(time.process_time() - begun[1])
            self.pictures.setdefault(kind, picture)
            if kind in self.alone:
                self.compared += 1
                self.differ += not torch.equal(picture, self.alone[kind])
            self.memory.append((number, psutil.Process().memory_info().rss))

    def _found(self, seconds: float, cpu_seconds: float) -> dict[str, Any]:
        """Latency, throughput and memory."""
        late = self.memory[len(self.memory) // 2 :]
        count = len(self.seconds)
        return {
            "requests": self.asked,
            "finished": count,
            "aborted": self.aborted,
            "lost": self.asked - count - self.aborted,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "requests_per_second": count / seconds,
            "requests_per_cpu_second": count / cpu_seconds,
            "latency_seconds": _quantiles(self.seconds),
            "latency_cpu_seconds": _quantiles(self.cpu_seconds),
            "memory": slope(late),
        }


class Server:
    """The plain pipeline."""

    def __init__(self, flux: Flux) -> None:
        self.flux = flux

    async def serve(self, number: int, kind: Kind, abort_at: int | None) -> Tensor:
        """A request's picture."""
        return await self.flux.generate(kind, plainly, abort_at=abort_at)


class WithSlots(Server):
    """lesa: a slot for every request, with its budget."""

    async def serve(self, number: int, kind: Kind, abort_at: int | None) -> Tensor:
        slots: list[lesa.Slot] = []

        def begin(scheduler: Any) -> AbstractContextManager[Any]:
            slot = lesa.Slot(self.flux.pipe, scheduler=scheduler, full_steps=kind.budget)
            slots.append(slot)
            return slot

        try:
            return await self.flux.generate(kind, begin, abort_at=abort_at)
        finally:
            for slot in slots:
                slot.clear()


class OneByOne(Server):
    """A cache whose state is the pipeline's: reset after every request, as pipelines do."""

    def __init__(self, flux: Flux) -> None:
        super().__init__(flux)
        self._turn = asyncio.Lock()

    async def serve(self, number: int, kind: Kind, abort_at: int | None) -> Tensor:
        async with self._turn:
            try:
                return await self.flux.generate(kind, plainly, abort_at=abort_at)
            finally:
                self.flux.pipe.transformer._reset_stateful_cache()


@contextmanager
def taylorseer(pipe: Any) -> Iterator[None]:
    """With every fifth step in full after the first three, diffusers' own setting."""
    pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=5, max_order=1))
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


def served_by_lesa(flux: Flux, kinds: list[Kind], options: argparse.Namespace) -> dict[str, Any]:
    """All requests, each picture compared with the one that is made alone."""
    pipe = flux.pipe
    lesa.enable(pipe, memory_limit=MEMORY_LIMIT)
    alone: dict[Kind, Tensor] = {}
    for kind in kinds:
        with lesa.options(full_steps=kind.budget):
            alone[kind] = flux.by_the_pipeline(kind)
    before, clients = lesa.stats(pipe), Clients(kinds, options, options.requests, alone)
    found = clients.run(WithSlots(flux))
    stats = lesa.stats(pipe)
    lesa.disable(pipe)
    return found | {
        "compared": clients.compared,
        "differ": clients.differ,
        "full_calls": stats.full - before.full,
        "skipped_calls": stats.skipped - before.skipped,
        "fallbacks": stats.fallbacks,
        "pool": stats.pool,
        "pictures": alone,
    }


def served_by(server: Server, kinds: list[Kind], options: argparse.Namespace) -> dict[str, Any]:
    """Fewer requests, by who does not forecast or has one budget for all."""
    clients = Clients(kinds, options, options.baseline_requests)
    return clients.run(server) | {"pictures": clients.pictures}


def with_psnr(found: dict[str, Any]) -> dict[str, Any]:
    """Instead of the pictures, their mean PSNR against those of the plain pipeline."""
    plain = found["plain"].pop("pictures")
    for name in found:
        pictures = found[name].pop("pictures", {})
        both = [kind for kind in pictures if kind in plain]
        levels = [float(psnr(pictures[kind], plain[kind]).mean()) for kind in both]
        levels = [level for level in levels if isfinite(level)]  # not of equal pictures
        if levels:
            found[name]["mean_psnr"] = sum(levels) / len(levels)
            found[name]["kinds_with_psnr"] = len(levels)
    return found


def faults(found: dict[str, Any]) -> list[str]:
    """What must not be."""
    mine = found["lesa"]
    told = {
        "pictures differ": mine["differ"],
        "requests were lost": sum(each["lost"] for each in found.values()),
        "bytes were not given back": mine["pool"]["used"],
        "calls fell back": sum(mine["fallbacks"].values()),
    }
    return [f"{count} {what}" for what, count in told.items() if count]


def show(found: dict[str, Any]) -> None:
    print("in CPU seconds:")
    for name, each in found.items():
        latency = each["latency_cpu_seconds"]
        told = {key: each.get(key) for key in ("finished", "aborted", "mean_psnr")}
        print(
            f"{name:11} p50 {latency['p50']:6.2f} s  p95 {latency['p95']:6.2f} s  "
            f"{each['requests_per_cpu_second']:6.2f} requests/s  {told}"
        )


def _quantiles(values: list[float]) -> dict[str, float]:
    """p50 and p95, by the nearest rank; 0 where nothing was measured."""
    ordered = sorted(values) or [0.0]
    ranks = {"p50": 0.5, "p95": 0.95}
    return {name: ordered[max(0, ceil(share * len(ordered)) - 1)] for name, share in ranks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000, help="served by lesa")
    parser.add_argument("--baseline-requests", type=int, default=100, help="by each of the others")
    parser.add_argument("--seconds", type=float, default=3600.0, help="limit for each of them")
    parser.add_argument("--kinds", type=int, default=24, help="different requests")
    parser.add_argument("--in-flight", type=int, default=4)
    parser.add_argument("--aborts", type=float, default=0.05, help="share of cancelled requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "serve.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    kinds = draw_kinds(options.kinds, options.seed)
    flux = Flux(testbed.load(), kinds)
    found = {"lesa": served_by_lesa(flux, kinds, options)}
    found["plain"] = served_by(Server(flux), kinds, options)
    with taylorseer(flux.pipe):
        found["taylorseer"] = served_by(OneByOne(flux), kinds, options)
    found = with_psnr(found)
    given = {key: value for key, value in vars(options).items() if key != "out"}
    write(options.out, {"environment": environment(), "options": given} | found)
    show(found)
    if wrong := faults(found):
        raise SystemExit("; ".join(wrong))


if __name__ == "__main__":
    main()
