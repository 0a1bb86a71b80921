"""DeepCache as a peer for U-Nets: its authors' own package, behind one context manager."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from lesa.core.schedule import Schedule
from lesa.evaluation.method import Bench, Method, Use
from lesa.evaluation.peers.metering import held_bytes


@dataclass(frozen=True)
class DeepCache:
    """Every N-th step in full, the outermost layers of the U-Net at every step."""

    takes_lists = False

    def unfit(self, bench: Bench) -> str | None:
        """It is made for U-Nets, and a package of its own."""
        if getattr(bench.pipe, "unet", None) is None:
            return f"needs a U-Net, {type(bench.pipe).__name__} has none; leave it out"
        if find_spec("DeepCache") is None:
            return "needs the package DeepCache; run pip install '.[eval]'"
        return None

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """The uniform interval with the fewest full steps that are not below `wanted`."""
        steps = bench.num_steps
        counts = {n: -(-steps // n) for n in range(1, steps + 1)}
        interval = min((n for n in counts if counts[n] >= wanted), key=lambda n: (counts[n], n))
        applied = partial(deepcache, interval=interval)
        return Method(name, steps, None, Schedule.fora(interval, steps), applied=applied)


UNETS = {"deepcache": DeepCache()}


@contextmanager
def deepcache(pipe: Any, interval: int) -> Iterator[Use]:
    """DeepCache on a pipeline for a while.

    Every `interval`-th step is computed in full. At the others `conv_in`, the last residual block
    of the U-Net and its output layers run on the current latent, with the deep feature of the last
    full step in place of all other blocks (cache branch 0). The pipeline is as before afterwards.
    Source: DeepCache (arXiv 2312.00858).
    """
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    try:
        yield Use(lambda: held_bytes(helper.cached_output))
    finally:
        helper.disable()
        _forget_forwards(pipe.unet)


def _forget_forwards(unet: Any) -> None:
    """Remove the instance attributes that the package leaves: they hold bound methods, which a
    copy or a pickle of the model would take along."""
    for module in unet.modules():
        own = module.__dict__.get("forward")
        if getattr(own, "__func__", None) is type(module).forward:
            del module.__dict__["forward"]
