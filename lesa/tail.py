"""The tail of a skipped step, with what depends on time alone computed once per generation."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lesa.call import Call
from lesa.clock import Step
from lesa.errors import LesaError
from lesa.hooks import Denoiser, core_of
from lesa.mixer import Mixer

__all__ = ["ModulatedTail", "Modulation", "PreparedTail"]

_MAX_SCHEDULES = 16
_SCALED = ("joint_attention_kwargs", "attention_kwargs")  # where a call puts its LoRA scale


class Modulation(NamedTuple):
    """Scale and shift [S, B, C] of every step: two halves of one tensor [S, B, 2 C]."""

    scale: Tensor
    shift: Tensor


class ModulatedTail:
    """`proj_out(layer_norm(h) * (1 + scale_s) + shift_s)`, as in FLUX, FLUX.2 and Qwen-Image.

    (scale_s, shift_s) = norm_out.linear(silu(embedding(t_s, ...))) for all steps s in one batch,
    instead of the whole forward around the blocks at each of them. The times are those that the
    pipeline itself passed when a generation first ran this schedule, bit for bit; until then a
    skipped step runs the model without its blocks.
    """

    def __init__(self, core: nn.Module, tail: str, embedding: str) -> None:
        # Looked up at each use: an adapter replaces modules. Weak: a cache keeps no model alive.
        self._core, self._tail, self._embedding = weakref.ref(core), tail, embedding
        self.eps = float(self.norm.norm.eps)
        self._times: OrderedDict[tuple[Any, ...], dict[int, Tensor]] = OrderedDict()

    @classmethod
    def of(cls, denoiser: Denoiser) -> ModulatedTail | None:
        """The tail of a model that has one of this form, else None."""
        from diffusers.models.normalization import AdaLayerNormContinuous

        spec, core = denoiser.spec, core_of(denoiser.model)
        if not spec.embedding:
            return None
        norm: Any = core.get_submodule(spec.tail)
        inner = getattr(norm, "norm", None)
        plain = isinstance(inner, nn.LayerNorm) and not inner.elementwise_affine
        if type(norm) is not AdaLayerNormContinuous or not plain:
            return None
        return cls(core, spec.tail, spec.embedding)

    @property
    def norm(self) -> Any:
        """The AdaLayerNormContinuous."""
        return self._module(self._tail)

    @property
    def projection(self) -> nn.Module:
        """The last layer: all that a skipped step runs beside the mix."""
        return self._module("proj_out")

    def _module(self, name: str) -> Any:
        core = self._core()
        if core is None:
            raise LesaError("model: it has been freed; enable lesa on a live one.")
        return getattr(core, name)

    def record(self, step: Step, embedded: tuple[Any, ...] | None) -> None:
        """Note the time that the embedding got at a step, which any step of its schedule tells."""
        if not embedded or not isinstance(embedded[0], Tensor):
            return
        key = _key(step, embedded[0])
        times = self._times.setdefault(key, {})
        self._times.move_to_end(key)
        if len(self._times) > _MAX_SCHEDULES:
            self._times.popitem(last=False)
        if step.index not in times:
            times[step.index] = embedded[0].detach().clone()

    def prepare(
        self, call: Call, embedded: tuple[Any, ...] | None, feature: Tensor
    ) -> PreparedTail | None:
        """The tail for the conditioning of this call, from its step on.

        None while some time of the schedule is unknown, or where the arguments are not understood.
        """
        step, batch = call.step, feature.shape[0]
        if not embedded or not isinstance(embedded[0], Tensor) or embedded[0].shape != (batch,):
            return None
        times, steps = (
            self._times.get(_key(step, embedded[0]), {}),
            range(step.index, step.num_steps),
        )
        if not all(s in times for s in steps):
            return None
        rest = [_repeated(value, len(steps), batch) for value in embedded[1:]]
        # It outlives this call, perhaps into one that is not in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            embedding, norm = self._module(self._embedding), self.norm
            rows = embedding(torch.cat([times[s] for s in steps]), *rest)
            rows = norm.linear(norm.silu(rows).to(feature.dtype))
        if rows.shape != (len(steps) * batch, 2 * feature.shape[-1]):
            return None
        scale, shift = rows.view(len(steps), batch, -1).chunk(2, dim=-1)
        return PreparedTail(self, Modulation(scale, shift), call)


class PreparedTail:
    """A `ModulatedTail` for one trajectory: its steps, its prompts, its guidance."""

    def __init__(self, tail: ModulatedTail, modulation: Modulation, call: Call) -> None:
        self.tail, self.modulation = tail, modulation
        self._guidance = call.argument("guidance")

    def takes(self, call: Call) -> bool:
        """Whether a call asks for this tail: the same guidance, no LoRA scale of its own."""
        if call.argument("guidance") is not self._guidance:
            return False
        return not any("scale" in (call.argument(name) or ()) for name in _SCALED)

    def run(self, index: int, mixer: Mixer, feature: Tensor | None = None) -> Tensor:
        """The model's output at a skipped step; the forecast feature goes to `feature`, if any."""
        normed = torch.empty_like(mixer.ring.features[0])
        scale, shift = self.modulation
        mixer.modulated(index, scale, shift, self.tail.eps, normed, feature)
        return self.tail.projection(normed)


def _key(step: Step, time: Tensor) -> tuple[Any, ...]:
    return step.sigmas, len(time), time.dtype, time.device


def _repeated(value: Any, steps: int, batch: int) -> Any:
    """A row per sample becomes a row per step and sample; features, read for their dtype, stay."""
    if isinstance(value, Tensor) and value.ndim in (1, 2) and value.shape[0] == batch:
        return value.repeat(steps, *[1] * (value.ndim - 1))
    return value
