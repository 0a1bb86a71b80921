"""What a model's blocks do while a cache is on it: seen call by call, on tiny real pipelines."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from lesa.evaluation.method import Bench
from lesa.evaluation.peers.layouts import all_blocks
from lesa.hooks.model_specs import model_spec
from lesa.hooks.wrappers import core_of
from tests.tiny_pipelines import build, run

STEPS = 8
PIPELINES = ("flux", "qwen", "hunyuan-video")


def make_case(name):
    """A pipeline, its call of 8 steps, its bench, and the plain result."""
    pipe, call = build(name)
    settings = {key: value for key, value in call().items() if key != "generator"}

    def arguments():
        return call(num_inference_steps=STEPS)

    bench = Bench(STEPS, pipe, settings, ("a title",))
    return SimpleNamespace(pipe=pipe, call=arguments, bench=bench, plain=run(pipe, arguments()))


class Calls:
    """Watches a model: per call of one branch the embedded tokens, the feature before the tail, the
    first block's output, and whether the last block had work to do."""

    def __init__(self, pipe):
        self.core = core_of(pipe.transformer)
        self.spec = model_spec(self.core)
        self.picture = 0 if "Hunyuan" in type(self.core).__name__ else 1
        self.seen = []

    def __enter__(self):
        blocks = all_blocks(self.core, self.spec)
        embedder = getattr(self.core, "x_embedder", None) or self.core.img_in
        inner = next(blocks[-1].children())
        self.handles = [
            embedder.register_forward_hook(self._embedded),
            blocks[0].register_forward_hook(self._first),
            inner.register_forward_hook(self._worked),
            self.spec.module(self.core, self.spec.tail).register_forward_pre_hook(self._tail),
        ]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def _embedded(self, module, args, output):
        self.seen.append(SimpleNamespace(x=output.double(), full=False))

    def _first(self, module, args, output):
        self.seen[-1].y = output[self.picture].double()

    def _worked(self, *_):
        self.seen[-1].full = True

    def _tail(self, module, args):
        self.seen[-1].h = args[0].double()


def applied(case, manager):
    """Result, the calls of each branch, and Use of a generation; none of it may stay behind."""
    with manager(case.pipe) as use, Calls(case.pipe) as calls:
        result = run(case.pipe, case.call())
    assert torch.equal(run(case.pipe, case.call()), case.plain)
    branches = len(calls.seen) // STEPS
    return result, [calls.seen[branch::branches] for branch in range(branches)], use


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
