"""Skipped steps that run a small network: the form "disca" of a trained forecaster."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lesa.core.forecaster import Tap
from lesa.core.schedule import Schedule
from lesa.engine.config import LesaConfig
from lesa.engine.controller import CacheController
from lesa.engine.graphs.step_graphs import StepGraphs
from lesa.engine.graphs.tail_graph import TailBuffers
from lesa.engine.mixer import Mixer
from lesa.engine.output_tap import weighed_latent
from lesa.engine.ring import Ring
from lesa.engine.step_table import StepTable
from lesa.engine.trajectory import Forecast, Memory, Refusal, Trajectory
from lesa.errors import LesaError
from lesa.forecasters.disca import DiscaForm
from lesa.hooks.alone import check_two_blocks, check_weights
from lesa.hooks.denoiser import Call, Denoiser, Run
from lesa.hooks.outputs import kind_of, make_output, read_sample
from lesa.hooks.two_blocks import Bridge, Noted, TwoBlocks
from lesa.hooks.wrappers import core_of

__all__ = ["PredictedTap", "PredictedController", "check_predictor", "form_of"]


def form_of(config: LesaConfig) -> DiscaForm | None:
    """The form of the configuration's forecaster where its skipped steps run a network."""
    net = getattr(config.forecaster, "net", None)
    return net if isinstance(net, DiscaForm) else None


def check_predictor(model: nn.Module, config: LesaConfig) -> None:
    """LesaError where a network of this form cannot run on the model, or not on the asked list."""
    form, forecaster = form_of(config), config.forecaster
    if form is None:
        return
    check_two_blocks(model)
    if not form.weights:
        raise LesaError("forecaster: form='disca' is not trained; train it with lesa.train")
    check_weights(model, form.weights)
    known: list[Schedule] = getattr(forecaster, "calibrated", [])
    _check_count(config)
    if config.schedule is not None and known:
        form.check_run(config.schedule.bind(known[0].steps) in known, known)


def _check_count(config: LesaConfig) -> None:
    """LesaError where the network was not trained for this number of full steps."""
    form, known = form_of(config), getattr(config.forecaster, "calibrated", [])
    if form is not None and config.full_steps is not None:
        form.check_count(config.full_steps, known)


class PredictedController(CacheController):
    """A controller whose full steps show what lies between the model's first and last block."""

    tap: PredictedTap
    check_budget = staticmethod(_check_count)

    def __init__(self, config: LesaConfig) -> None:
        super().__init__(config)
        form = form_of(config)
        assert form is not None
        self.tap = PredictedTap(form, config.forecaster.branch)  # type: ignore[attr-defined]

    def _full(
        self,
        denoiser: Denoiser,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: Call | None,
        trajectory: Trajectory | None,
    ) -> Any:
        self.tap.forget()
        if call is None or trajectory is None or not trajectory.enters(call.step):
            return super()._full(denoiser, args, kwargs, call, trajectory)
        with self.tap.noting(denoiser):
            return super()._full(denoiser, args, kwargs, call, trajectory)


class _Own(threading.local):
    """What a thread's full step has shown, and the bridge that is made of it."""

    noted: Noted | None = None
    bridge: Bridge | None = None


class PredictedTap:
    """The output tap with a network: see `lesa.engine.trajectory.FeatureTap`.

    A skipped step mixes the ring and the current latent as the table says, then adds the output of
    the model run with two blocks in the place of all. That is Python and the launches of two
    blocks; no CUDA graph is captured.
    """

    name: Tap = "output"
    inside = False
    graphs: StepGraphs[TailBuffers] | None = None

    def __init__(self, form: DiscaForm, stored_branch: Callable[[str], str]) -> None:
        self._form, self._stored_branch = form, stored_branch
        self._own = _Own()
        self._built: weakref.WeakKeyDictionary[nn.Module, TwoBlocks] = weakref.WeakKeyDictionary()

    def noting(self, denoiser: Denoiser) -> Any:
        """Note the blocks of the next full step."""
        self._own.noted = noted = Noted()
        return noted.of(core_of(denoiser.model))

    def forget(self) -> None:
        """Drop what this thread's last full step has shown."""
        self._own.noted = self._own.bridge = None

    def take(self, call: Call, run: Run) -> Tensor | None:
        """The output of a full step; its bridge is ready for `Bridged.push`."""
        sample = read_sample(run.output)
        if sample is None:
            raise Refusal("the model returns no single tensor")
        noted, self._own.noted = self._own.noted, None
        if noted is not None:
            core = core_of(call.denoiser.model)
            with call.denoiser.turn:
                bridge = self.network(core).bridge(core, noted, partial(_run, call))
            self._own.bridge = bridge
        return sample

    def network(self, core: nn.Module) -> TwoBlocks:
        """The trained network of a model, built at its first full step, on its device.

        Raises:
            LesaError: the weights are of other blocks.
        """
        found = self._built.get(core)
        if found is None:
            with torch.inference_mode(False):
                found = TwoBlocks(core, self._form.weights).requires_grad_(False)
            self._built[core] = found
        return found

    def forecast(
        self, call: Call, run: Run, feature: Tensor, table: StepTable, memory: Memory
    ) -> Forecast:
        """See `FeatureTap`."""
        gains = self._form.gains[self._stored_branch(call.step.branch)].tolist()
        data = memory(table.history, feature)
        ring = BridgedRing(table.history, feature, data, self._own)
        network = self.network(core_of(call.denoiser.model)).to(feature.device)
        return _PredictedForecast(kind_of(run.output), network, gains, table, ring)


class BridgedRing(Ring):
    """A ring that also keeps the bridge of its newest feature.

    Attributes:
        bridge: that one.
    """

    def __init__(self, history: int, like: Tensor, data: Tensor, own: _Own) -> None:
        super().__init__(history, like, data)
        self._own = own
        self.bridge: Bridge = {}

    def push(self, feature: Tensor) -> None:
        """Copy `feature` over the oldest one, and take the bridge that was made of its step."""
        bridge, self._own.bridge = self._own.bridge, None
        if bridge is None:
            raise Refusal("the full step showed no bridge between its blocks")
        super().push(feature)
        self.bridge = bridge

    @property
    def nbytes(self) -> int:
        """Bytes of the K features and of the bridge."""
        return super().nbytes + sum(part.nbytes for part in self.bridge.values())


class _PredictedForecast:
    """A mix, and the network's output on top."""

    def __init__(
        self,
        kind: Any,
        network: TwoBlocks,
        gains: list[float],
        table: StepTable,
        ring: BridgedRing,
    ) -> None:
        self.ring: Ring = ring
        self._bridged = ring
        self._kind, self._network, self._gains, self._table = kind, network, gains, table
        self._mixer = Mixer(table, ring)

    def __call__(self, call: Call, index: int) -> Any:
        denoiser, like = call.denoiser, self.ring.features[0]
        latent = weighed_latent(call, like) if self._table.uses_latent else None
        output = self._mixer(index, torch.empty_like(like), latent)
        core = core_of(denoiser.model)
        with denoiser.turn, self._network.in_place_of_blocks(core, self._bridged.bridge):
            predicted = read_sample(_run(call))
        assert predicted is not None  # as at the full step
        output.add_(predicted.to(output.dtype), alpha=self._gains[index])
        return make_output(self._kind, output)


def _run(call: Call) -> Any:
    return call.denoiser.run(call.args, call.kwargs).output
