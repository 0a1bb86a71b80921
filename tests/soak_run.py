"""A soak: random requests one after another, each picture compared bit for bit, memory watched."""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from random import Random
from statistics import linear_regression
from typing import Any

import psutil
import torch
from soak_requests import METHODS, Pipelines, Request, arguments, draw_request, inside, serve

import lesa
from lesa import LesaError, testbed
from lesa.hooks.attach import attached
from lesa.hooks.pipeline import find_denoiser

TRAINED = ("trained", "trained hidden")
EVERY = 10  # requests between two samples of memory
WRONG = ({"full_steps": 0}, {"tap": "middle"}, {"forecaster": "no-such-method"})


@dataclass
class Soak:
    """What a soak found; `differ` holds the requests whose picture is another than alone."""

    requests: int = 0
    compared: int = 0
    distinct: int = 0
    differ: list[dict[str, Any]] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[int, int, int]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Counts, and the slopes of memory over the second half, when all caches are filled."""
        found = {
            name: dict(value.most_common()) if isinstance(value, Counter) else value
            for name, value in vars(self).items()
        }
        late = [sample for sample in self.samples if sample[0] > self.requests / 2]
        return found | {
            "memory": {
                name: slope([(at, values[column]) for at, *values in late])
                for column, name in enumerate(("rss_bytes", "live_tensors"))
            }
        }


def trained() -> dict[str, dict[str, Any]]:
    """A forecaster of each pipeline and tap, quickly trained."""
    quick = {"form": "table", "refine": 0, "polish": 0, "progress": False}
    pipes, found = Pipelines.load(), {}
    call = {"height": 32, "width": 32, "max_sequence_length": 20, "guidance_scale": 3.5}
    request = Request("sdxl", None, "own", 8, 16, 2, 5.0, 0, 0)
    given = serve_arguments(pipes, request)
    for name, prompts, options in (
        ("flux", testbed.captions(2, split="train"), call),
        ("sdxl", None, given),
    ):
        train = partial(lesa.train, pipes.made[name], prompts, 8, 4, call=options, **quick)
        found[name] = {which: train(tap=which.partition(" ")[2] or "output") for which in TRAINED}
    return found


def serve_arguments(pipes: Pipelines, request: Request) -> dict[str, Any]:
    """The call of a request as `lesa.train` takes it."""
    left_out = ("num_inference_steps", "generator", "output_type")
    call = arguments(pipes.pipe(request), request)
    return {name: value for name, value in call.items() if name not in left_out}


def expected(pipes: Pipelines, request: Request) -> str:
    """What a request gives on pipelines with no past, enabled for it."""
    found = _alone(pipes, request)
    if request.event == "nested" and "+" in found:
        return found.partition("+")[0] + "+" + _alone(pipes, inside(request))
    return found


def _alone(pipes: Pipelines, request: Request) -> str:
    new = pipes.fresh()
    if request.method is not None:
        lesa.enable(new.made[request.name], **new.config(request))
    return serve(new, request)


class Server:
    """Long-lived pipelines, enabled and disabled as requests ask for it."""

    def __init__(self, pipes: Pipelines, random: Random, found: Soak) -> None:
        self.pipes, self.random, self.found = pipes, random, found
        self.methods: dict[str, str | None] = dict.fromkeys(pipes.made)

    def choose(self, known: list[Request]) -> Request:
        """The next request: mostly one for what is switched on."""
        alike = [request for request in known if request.method == self.methods[request.name]]
        return self.random.choice(alike if alike and self.random.random() < 0.6 else known)

    def serve(self, request: Request) -> str:
        """The picture of a request, after what it needs has been switched on or off."""
        inside_of = self.random.choice(
            (contextlib.nullcontext, torch.no_grad, torch.inference_mode)
        )
        renew = self.random.random() < 0.2
        if self.random.random() < 0.1:
            self._mistake(request)
        with self._method(request), inside_of():
            return serve(self.pipes, request, renew=renew)

    @contextlib.contextmanager
    def _method(self, request: Request) -> Iterator[None]:
        pipe, wanted = self.pipes.made[request.name], request.method
        if wanted == self.methods[request.name]:
            self.found.changes["none"] += 1
            yield
        elif wanted is not None and self.random.random() < 0.3:
            self.found.changes["accelerate"] += 1
            with lesa.accelerate(pipe, **self.pipes.config(request)):
                yield
                self._count(pipe)
        else:
            self._count(pipe)
            self.methods[request.name] = wanted
            if wanted is None:
                lesa.disable(pipe)
            else:
                lesa.enable(pipe, **self.pipes.config(request))
            self.found.changes["disable" if wanted is None else "enable"] += 1
            yield

    def _mistake(self, request: Request) -> None:
        """A wrong option raises, and leaves all as it was."""
        self.found.changes["refused"] += 1
        try:
            lesa.enable(self.pipes.made[request.name], **self.random.choice(WRONG))
        except LesaError:
            return
        raise AssertionError("a wrong option was accepted")

    def end(self) -> None:
        """Count what the controllers have counted, and switch them off."""
        for pipe in self.pipes.made.values():
            self._count(pipe)
            lesa.disable(pipe)

    def _count(self, pipe: Any) -> None:
        if attached(find_denoiser(pipe)) is None:
            return
        stats = lesa.stats(pipe)
        self.found.calls.update({"full": stats.full, "skipped": stats.skipped})
        self.found.fallbacks.update(stats.fallbacks)


def soak(
    requests: int,
    seed: int = 0,
    *,
    seconds: float = float("inf"),
    distinct: int | None = None,
    told: Callable[[str], None] = lambda _: None,
) -> Soak:
    """Serve so many random requests, or as many as fit into `seconds`.

    They are drawn from `distinct` different ones, a fifth by default. What each of them gives
    alone is made first, on pipelines of its own, so that memory is watched over the soak only.
    """
    random, end = Random(seed), time.monotonic() + seconds
    pipes = Pipelines.load(trained())
    methods = [*METHODS, *TRAINED]
    pool: dict[Request, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what enable says of schedulers that repeat levels
        while len(pool) < (distinct or max(1, requests // 5)):
            request = draw_request(random, methods)
            pool[request] = expected(pipes, request)
        told(f"{len(pool)} distinct requests served alone")
        return _serve_all(pipes, pool, random, requests, end, told)


def _serve_all(
    pipes: Pipelines,
    pool: dict[Request, str],
    random: Random,
    requests: int,
    end: float,
    told: Callable[[str], None],
) -> Soak:
    found, known = Soak(distinct=len(pool)), [*pool]
    server = Server(pipes, random, found)
    while found.requests < requests and time.monotonic() < end:
        request = server.choose(known)
        served = server.serve(request)
        found.requests += 1
        found.ended[_how(served)] += 1
        found.events[str(request.event)] += 1
        found.compared += served != "stopped"
        if served != pool[request]:
            found.differ.append(asdict(request) | {"served": served, "alone": pool[request]})
            told(f"request {found.requests} differs: {found.differ[-1]}")
        if found.requests % EVERY == 0:
            found.samples.append((found.requests, *memory()))
        if found.requests % 100 == 0:
            told(f"{found.requests} requests, {len(found.differ)} differ")
    server.end()
    return found


def _how(served: str) -> str:
    """A picture, or how the request ended else."""
    first = served.partition(" ")[0]
    return first.rstrip(":") if first in ("stopped", "closed", "refused:", "not") else "picture"


def memory() -> tuple[int, int]:
    """Resident bytes of this process and the number of live tensors."""
    gc.collect()
    alive = sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())
    return psutil.Process().memory_info().rss, alive


def slope(points: list[tuple[int, int]]) -> dict[str, float]:
    """The least-squares line through (request, value), per 100 requests, with its standard error
    and the scatter about it."""
    if len(points) < 3:
        return {}
    x, y = [float(at) for at, _ in points], [float(value) for _, value in points]
    line = linear_regression(x, y)
    rest = [b - line.slope * a - line.intercept for a, b in zip(x, y, strict=True)]
    scatter = (sum(r * r for r in rest) / (len(points) - 2)) ** 0.5
    spread = sum((a - sum(x) / len(x)) ** 2 for a in x) ** 0.5
    return {
        "per_100_requests": 100 * line.slope,
        "standard_error": 100 * scatter / spread,
        "scatter": scatter,
        "samples": len(points),
        "first": y[0],
        "last": y[-1],
    }
