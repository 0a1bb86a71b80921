"""The tail of a skipped step, with what depends on time alone computed once per generation."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from lesa.engine import nvtx_ranges
from lesa.engine.graphs.step_graphs import StepGraphs
from lesa.engine.graphs.tail_graph import TailBuffers, TailGraph
from lesa.engine.mixer import Mixer
from lesa.engine.modulation import Modulation
from lesa.engine.step_table import StepTable
from lesa.errors import LesaError
from lesa.hooks.denoiser import Call, Denoiser
from lesa.hooks.step_clock import Step
from lesa.hooks.wrappers import core_of
from lesa.util.forks import renew_in_children

__all__ = ["ModulatedTail", "PreparedTail"]

_MAX_SCHEDULES = 16
_SCALED = ("joint_attention_kwargs", "attention_kwargs")  # where a call puts its LoRA scale


class _Times(dict[int, Tensor]):
    """The times of a schedule's steps, as far as they have been seen."""


class ModulatedTail:
    """`proj_out(layer_norm(h) * (1 + scale_s) + shift_s)`, as in FLUX, FLUX.2 and Qwen-Image.

    (scale_s, shift_s) = norm_out.linear(silu(embedding(t_s, ...))) for all steps s in one batch,
    instead of the whole forward around the blocks at each of them. The times are those that the
    pipeline itself passes: where a schedule is new, a skipped step first runs the model without its
    blocks to see its time.
    """

    def __init__(
        self,
        core: nn.Module,
        tail: str,
        embedding: str,
        graphs: StepGraphs[TailBuffers] | None = None,
    ) -> None:
        self.graphs = graphs
        # Looked up at each use: an adapter replaces modules. Weak: a cache keeps no model alive.
        self._core, self._tail, self._embedding = weakref.ref(core), tail, embedding
        self.eps = float(self.norm.norm.eps)
        # By schedule: those that a trajectory has, and the newest ones, which the next may ask for.
        self._live: weakref.WeakValueDictionary[Any, _Times] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[Any, _Times] = OrderedDict()
        self.renew()
        renew_in_children(self)

    def renew(self) -> None:
        """In a forked process: nobody else is in it."""
        self._lock = threading.Lock()

    @classmethod
    def of(
        cls, denoiser: Denoiser, graphs: StepGraphs[TailBuffers] | None = None
    ) -> ModulatedTail | None:
        """The tail of a model that has one of this form, else None; captured into `graphs`."""
        from diffusers.models.normalization import AdaLayerNormContinuous

        spec, core = denoiser.spec, core_of(denoiser.model)
        if not spec.embedding:
            return None
        norm: Any = core.get_submodule(spec.tail)
        inner = getattr(norm, "norm", None)
        plain = isinstance(inner, nn.LayerNorm) and not inner.elementwise_affine
        if type(norm) is not AdaLayerNormContinuous or not plain:
            return None
        return cls(core, spec.tail, spec.embedding, graphs)

    @property
    def embedding(self) -> nn.Module:
        """Turns (time, ...) into what the norm's scale and shift are made from."""
        return self._module(self._embedding)

    @property
    def norm(self) -> Any:
        """The AdaLayerNormContinuous."""
        return self._module(self._tail)

    @property
    def projection(self) -> nn.Module:
        """The last layer: all that a skipped step runs beside the mix."""
        return self._module("proj_out")

    @property
    def model(self) -> nn.Module:
        """The denoiser."""
        core = self._core()
        if core is None:
            raise LesaError("model: it has been freed; enable lesa on a live one")
        return core

    def _module(self, name: str) -> Any:
        return getattr(self.model, name)

    def record(self, step: Step, embedded: tuple[Any, ...] | None) -> None:
        """Note the time that the embedding got at a step, which any step of its schedule tells."""
        if not embedded or not isinstance(embedded[0], Tensor):
            return
        times = self._times_of(step, embedded[0])
        if step.index not in times:
            times[step.index] = embedded[0].detach().clone()

    def _times_of(self, step: Step, time: Tensor) -> _Times:
        """Those of the schedule that a step with this time belongs to."""
        key = step.generation.times, len(time), time.dtype, time.device
        with self._lock:
            times = self._live.get(key)
            if times is None:
                times = self._live[key] = _Times()
            self._recent[key] = times
            self._recent.move_to_end(key)
            if len(self._recent) > _MAX_SCHEDULES:
                self._recent.popitem(last=False)
        return times

    def prepare(
        self, call: Call, embedded: tuple[Any, ...] | None, feature: Tensor, steps: int
    ) -> PreparedTail | None:
        """The tail for the last so many steps with the conditioning of this call, or None where it
        is not understood."""
        batch = feature.shape[0]
        if not embedded or not isinstance(embedded[0], Tensor) or embedded[0].shape != (batch,):
            return None
        known = self._times_of(call.step, embedded[0])
        prepared = PreparedTail(self, call, embedded, known, steps)
        width = prepared.modulation(feature).scale.shape[-1]
        return prepared if width == feature.shape[-1] else None


class PreparedTail:
    """A `ModulatedTail` for one trajectory: its steps, its prompts, its guidance."""

    def __init__(
        self,
        tail: ModulatedTail,
        call: Call,
        embedded: tuple[Any, ...],
        times: _Times,
        steps: int,
    ) -> None:
        self.tail = tail
        self._times, self._known = times, 0
        total, self._like = call.step.num_steps, embedded[0]
        self._steps = range(total - steps, total)
        self._rest = [_repeated(value, len(self._steps), len(self._like)) for value in embedded[1:]]
        self._guidance, self._turn = call.argument("guidance"), call.denoiser.turn
        self._graph: TailGraph | None = None

    def claim(self, call: Call, table: StepTable, feature: Tensor) -> Tensor | None:
        """Memory for the ring that a captured step reads, or None where none is captured."""
        graphs = self.tail.graphs
        if graphs is None or table.autoregressive:  # whose forecasts enter the ring
            return None
        self._graph = TailGraph.acquire(graphs, self.tail, table, call.step.branch, feature)
        return None if self._graph is None else self._graph.ring

    def takes(self, call: Call) -> bool:
        """Whether a call asks for this tail: the same guidance, no LoRA scale of its own."""
        if call.argument("guidance") is not self._guidance:
            return False
        return not any("scale" in (call.argument(name) or ()) for name in _SCALED)

    def knows(self, step: Step) -> bool:
        """Whether the schedule's time at this step has been seen."""
        return step.index in self._times

    def run(self, index: int, mixer: Mixer, feature: Tensor | None = None) -> Tensor:
        """The model's output at a skipped step; the forecast feature goes to `feature`, if any."""
        like = mixer.ring.features[0]
        modulation = self.modulation(like)
        if self._graph is not None:
            return self._graph.run(index, mixer.ring, modulation)
        normed = torch.empty_like(like)
        mixer.modulated(index, modulation, self.tail.eps, normed, feature)
        with nvtx_ranges.tail:
            return self.tail.projection(normed)

    def modulation(self, feature: Tensor) -> Modulation:
        """Scale and shift of all steps; computed anew only while times become known.

        A step whose time is unknown gets a filler: the batch must have the same shape in the first
        generation as in later ones, or their last bits would differ.
        """
        if self._known < len(self._times):
            self._known = len(self._times)
            times = [self._times.get(s, self._like) for s in self._steps]
            # The rows outlive this call, perhaps into one that is not in inference mode.
            with self._turn, torch.inference_mode(False), torch.no_grad():
                rows = self.tail.embedding(torch.cat(times), *self._rest)
                rows = self.tail.norm.linear(self.tail.norm.silu(rows).to(feature.dtype))
            both = rows.view(len(self._steps), len(self._like), -1)
            self._modulation = Modulation.of(both)
        return self._modulation


def _repeated(value: Any, steps: int, batch: int) -> Any:
    """A row per sample becomes a row per step and sample; of features only the dtype is read."""
    if not isinstance(value, Tensor):
        return value
    if value.ndim > 2:
        return value.new_empty(0)
    rows = value.ndim > 0 and value.shape[0] == batch
    return value.repeat(steps, *[1] * (value.ndim - 1)) if rows else value
