"""A skipped step of the hidden tap as one CUDA graph: mix_modulate -> proj_out.

The output tap has none: its skipped step is a single kernel, and a replay costs more than a launch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from lesa.engine.graphs.capture import Body
from lesa.engine.graphs.step_graphs import GraphKey, Lease, StepGraphs
from lesa.engine.modulation import Modulation
from lesa.engine.ring import Ring
from lesa.engine.step_table import StepTable
from lesa.ops import implementation

__all__ = ["LastLayer", "TailBuffers", "TailGraph"]


class LastLayer(Protocol):
    """What a graph takes of a model: the layer behind the modulated norm, and the norm's eps.

    `projection` is asked for at each use, since an adapter replaces modules.
    """

    eps: float

    @property
    def projection(self) -> nn.Module: ...

    @property
    def model(self) -> nn.Module: ...


class TailBuffers:
    """The tensors that the graph reads: all that varies from step to step is in them.

    ring [K, *feature], slots [K] and step (one of `steps`), table [S, K], bias [S], rows
    [S, B, 2 C] of scale and shift. `normed`, as large as a feature, is written: inside a graph's
    memory it would outlive it.
    """

    def __init__(self, table: StepTable, feature: Tensor) -> None:
        rows = table.on(feature.device)
        self.steps = rows.steps
        self.ring = feature.new_empty(table.history, *feature.shape)
        self.slots = feature.new_zeros(table.history, dtype=torch.int32)
        self.step = feature.new_zeros((), dtype=torch.int32)
        self.table, self.bias = rows.coefficients, rows.bias
        self.rows = feature.new_empty(len(table.rows), feature.shape[0], 2 * feature.shape[-1])
        self.normed = torch.empty_like(feature, memory_format=torch.contiguous_format)


class TailGraph:
    """The graph for one trajectory, from its first full step on.

    Attributes:
        ring: memory for the trajectory's ring, which the graph reads.
    """

    def __init__(self, lease: Lease[TailBuffers]) -> None:
        self._lease = lease
        self._pushed = -1
        self._modulation: Modulation | None = None
        self.ring = lease.buffers.ring

    @classmethod
    def acquire(
        cls,
        graphs: StepGraphs[TailBuffers],
        layer: LastLayer,
        table: StepTable,
        branch: str,
        feature: Tensor,
    ) -> TailGraph | None:
        """A graph of the active backend's `mix_modulate` and the model's last layer.

        Args:
            graphs: the controller's.
            layer: the model's last layer.
            table: has the rows that the graph reads.
            branch: the guidance branch.
            feature: gives the layout of what goes into the ring.

        Returns:
            None where nothing is to be recorded; the reason is counted.
        """
        bias = table.on(feature.device).bias
        mix_modulate = implementation("mix_modulate", feature, table.history, {"bias": bias})
        layout = tuple(feature.shape), feature.dtype, feature.device
        variant = bias is None, mix_modulate
        key = GraphKey(*layout, branch, table.history, len(table.rows), variant)
        lease = graphs.acquire(
            key,
            (layer.projection,),
            partial(TailBuffers, table, feature),
            partial(_body, layer, mix_modulate),
            model=layer.model,
        )
        if lease.reason is not None:
            graphs.count(f"refused: {lease.reason}")
            return None
        return cls(lease)

    def run(self, index: int, ring: Ring, modulation: Modulation) -> Tensor:
        """The model's output at the table's step `index`."""
        buffers = self._lease.buffers
        if self._modulation is not modulation:
            self._modulation = modulation
            scale, shift = buffers.rows.chunk(2, dim=-1)
            scale.copy_(modulation.scale)
            shift.copy_(modulation.shift)
        if self._pushed != ring.pushed:
            self._pushed = ring.pushed
            buffers.slots.copy_(ring.slots)
        buffers.step.copy_(buffers.steps[index])
        return self._lease.run()


def _body(layer: LastLayer, mix_modulate: Callable[..., Tensor], buffers: TailBuffers) -> Body:
    scale, shift = buffers.rows.chunk(2, dim=-1)
    given = (buffers.ring, buffers.slots, buffers.table, buffers.step, scale, shift)

    def body() -> Tensor:
        mix_modulate(*given, buffers.normed, bias=buffers.bias, eps=layer.eps)
        return layer.projection(buffers.normed)

    return body
