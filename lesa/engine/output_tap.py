"""The forecasts of the output tap: what the model returns, mixed from what it returned before."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lesa.core.forecaster import Tap
from lesa.engine.graphs.step_graphs import StepGraphs
from lesa.engine.graphs.tail_graph import TailBuffers
from lesa.engine.mixer import Mixer
from lesa.engine.packed_output import PackedOutput
from lesa.engine.ring import Ring
from lesa.engine.step_table import StepTable
from lesa.engine.trajectory import Forecast, Memory, Refusal
from lesa.hooks.denoiser import Call, Run
from lesa.hooks.outputs import as_batch, has_variance, kind_of, make_output, read_sample

__all__ = ["OutputTap", "weighed_latent"]


class OutputTap:
    """The feature is what the model returns, so that a skipped step runs no module at all.

    Several tensors are packed into one feature. It has no graphs: a replay costs more than the one
    launch of a skipped step.
    """

    name: Tap = "output"
    inside = False
    graphs: StepGraphs[TailBuffers] | None = None

    def take(self, call: Call, run: Run) -> Tensor | None:
        """See `FeatureTap`."""
        written = _written_cache(call)
        if written is not None:
            raise Refusal(f"the model writes to {written} in this call")
        sample = read_sample(run.output)
        if sample is not None:
            return sample
        try:
            return PackedOutput(run.output).pack(run.output)
        except TypeError as reason:
            raise Refusal(str(reason)) from None

    def forecast(
        self, call: Call, run: Run, feature: Tensor, table: StepTable, memory: Memory
    ) -> Forecast:
        """See `FeatureTap`."""
        ring = Ring(table.history, feature, memory(table.history, feature))
        if read_sample(run.output) is None:
            return _OutputForecast(PackedOutput(run.output).rebuild, ring, table)
        return _OutputForecast(partial(make_output, kind_of(run.output)), ring, table)


def _written_cache(call: Call) -> str | None:
    """The argument in which this call leaves something for later ones, if any.

    Models of diffusers that take a cache of keys and values get a mode beside it, in which
    "cached" means that it is read only, or flags, of which `is_cache_step` tells the same.
    """
    given = {name: call.argument(name) for name in call.denoiser.spec.stateful}
    caches = [name for name, value in given.items() if value is not None and value is not False]
    for value in given.values():
        if value == "cached" or (isinstance(value, dict) and value.get("is_cache_step") is False):
            return None
    return caches[0] if caches else None


def weighed_latent(call: Call, like: Tensor) -> Tensor:
    """The current latent, to be mixed with features, with zeros where these have a variance behind;
    Refusal where it has another shape."""
    latent = as_batch(call.argument(call.denoiser.spec.latent))
    if latent is None or not (latent.shape == like.shape or has_variance(like, latent)):
        raise Refusal("latent and output differ in shape")
    if latent.shape != like.shape:
        latent = torch.cat([latent, torch.zeros_like(latent)], dim=1)
    return latent.to(like.dtype)  # under autocast the first ones may be wider


class _OutputForecast:
    """One mix into a new tensor, with the current latent where the table has a weight for it."""

    def __init__(self, rebuild: Callable[[Tensor], Any], ring: Ring, table: StepTable) -> None:
        self.ring = ring
        self._table, self._rebuild = table, rebuild
        self._mixer = Mixer(table, self.ring)

    def __call__(self, call: Call, index: int) -> Any:
        table, like = self._table, self.ring.features[0]
        latent = weighed_latent(call, like) if table.uses_latent else None
        feature = self._mixer(index, torch.empty_like(like), latent)
        if table.pushes[index]:
            self.ring.push(feature)
        return self._rebuild(feature)
