"""The forecasts of the hidden tap: a feature inside the model, and the model's tail behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lesa.core.forecaster import Tap
from lesa.engine import nvtx_ranges
from lesa.engine.graphs.step_graphs import StepGraphs
from lesa.engine.graphs.tail_graph import TailBuffers
from lesa.engine.mixer import Mixer
from lesa.engine.ring import Ring
from lesa.engine.step_table import StepTable
from lesa.engine.tail import ModulatedTail, PreparedTail
from lesa.engine.trajectory import Forecast, Memory, Refusal
from lesa.hooks.denoiser import Call, Denoiser, Run
from lesa.hooks.outputs import make_output, read_sample

__all__ = ["HiddenTap"]


class HiddenTap:
    """The feature is the input of the model's last norm; see `lesa.engine.trajectory.FeatureTap`.

    Attributes:
        graphs: captures skipped steps where the model's tail allows it.
    """

    name: Tap = "hidden"
    inside = True

    def __init__(self, graphs: StepGraphs[TailBuffers] | None = None) -> None:
        self.graphs = graphs
        self._tail: ModulatedTail | None = None
        self._searched = False

    def take(self, call: Call, run: Run) -> Tensor | None:
        """The feature of a full step; its time is noted."""
        tail = self._tail_of(call.denoiser)
        if tail is not None:
            tail.record(call.step, run.embedded)
        return run.feature

    def forecast(
        self, call: Call, run: Run, feature: Tensor, table: StepTable, memory: Memory
    ) -> Forecast:
        """With the tail prepared for this trajectory where it can be, else the model's own. A graph
        has a ring of its own, since that lies in its buffers."""
        tail, prepared, data = self._tail_of(call.denoiser), None, None
        if tail is not None and read_sample(run.output) is not None:
            prepared = tail.prepare(call, run.embedded, feature, len(table.rows))
        if prepared is not None:
            data = prepared.claim(call, table, feature)
        if data is None:
            data = memory(table.history, feature)
        plain = _HiddenForecast(tail, table, Ring(table.history, feature, data))
        return plain if prepared is None else _PreparedForecast(type(run.output), prepared, plain)

    def _tail_of(self, denoiser: Denoiser) -> ModulatedTail | None:
        """The tail whose modulation is computed ahead, looked for once."""
        if not self._searched:
            self._tail, self._searched = ModulatedTail.of(denoiser, self.graphs), True
        return self._tail


class _HiddenForecast:
    """A mix, then the model's own forward without its blocks."""

    def __init__(self, tail: ModulatedTail | None, table: StepTable, ring: Ring) -> None:
        self.ring, self.table = ring, table
        self.mixer = Mixer(table, ring)
        self._tail = tail

    def __call__(self, call: Call, index: int) -> Any:
        feature = self.mixer(index, torch.empty_like(self.ring.features[0]))
        output = self.run_tail(call, feature)
        if self.table.pushes[index]:
            self.ring.push(feature)
        return output

    def run_tail(self, call: Call, feature: Tensor) -> Any:
        """The output of the model without its blocks; the time of this step is noted.

        Raises:
            Refusal: the tail gets another shape.
        """
        with nvtx_ranges.tail:
            run = call.denoiser.run_tail(feature, call.args, call.kwargs)
        if run.output is None:
            raise Refusal("feature and tail differ in shape")
        if self._tail is not None:
            self._tail.record(call.step, run.embedded)
        return run.output


class _PreparedForecast:
    """A modulated mix, then the last layer; a call that the tail does not fit goes to `plain`."""

    def __init__(self, kind: type, tail: PreparedTail, plain: _HiddenForecast) -> None:
        self.ring = plain.ring
        self._kind, self._tail, self._plain = kind, tail, plain

    def __call__(self, call: Call, index: int) -> Any:
        tail, plain, ring = self._tail, self._plain, self.ring
        if not tail.takes(call):
            return plain(call, index)
        if not tail.knows(call.step):
            plain.run_tail(call, ring.features[0])
        feature = torch.empty_like(ring.features[0]) if plain.table.pushes[index] else None
        output = make_output(self._kind, tail.run(index, plain.mixer, feature))
        if feature is not None:
            ring.push(feature)
        return output
