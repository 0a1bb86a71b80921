"""The forecasts of one plan from one ring, on whatever backend is active where the ring lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from lesa import ops
from lesa.core.table import GatedRows
from lesa.engine import nvtx_ranges
from lesa.engine.ring import Ring
from lesa.engine.step_table import Plan
from lesa.errors import LesaError
from lesa.ops import eager, native

__all__ = ["Mixer", "Modulation"]


@dataclass(frozen=True, eq=False)
class Modulation:
    """Scale and shift [S, B, C] of all steps, two halves of one tensor [S, B, 2 C]."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, both: Tensor) -> Modulation:
        """From the tensor [S, B, 2 C]."""
        return cls(*both.chunk(2, dim=-1))

    @cached_property
    def rows(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Both by step."""
        return tuple(zip(self.scale.unbind(0), self.shift.unbind(0), strict=True))


class Mixer:
    """`mixer(s, out)` writes h_hat_s = sum_k c[s, k] ring[k] (+ c_latent x_s) (+ bias_s) to `out`.

    What varies from step to step lies on the device already: no step copies from the host or waits
    for the device. It calls the kernels themselves, since the dispatcher would double the time that
    the host takes; `lesa.ops` is for everybody else.

    Raises:
        LesaError: LESA_BACKEND forces a backend that does not work on the ring's device.
    """

    def __init__(self, plan: Plan, ring: Ring) -> None:
        self.plan, self.ring = plan, ring
        feature, device = ring.features[0], ring.data.device
        self.table = table = plan.on(device)
        if len(feature) % plan.parts:
            raise LesaError(f"a batch of {len(feature)} does not hold {plan.parts} guidance parts.")
        # To a kernel the guidance parts of a batch are bands.
        self._band = None if plan.parts == 1 else feature.numel() // plan.parts
        options = {} if self._band is None else {"band_size": self._band}
        self._mix: Callable[..., Any] = ops.implementation("mix", feature, ring.history, options)
        self._modulate: Callable[..., Any] = ops.implementation(
            "mix_modulate", feature, ring.history, {"bias": table.bias}
        )
        # Functions, not bound methods: those would make a cycle that keeps the ring alive.
        self._write, self._write_modulated = Mixer._eager, Mixer._launch_modulated
        if self._mix is eager.mix or feature.dtype == torch.float64:  # whose rows stay float64
            table = table._replace(gated=None)
            if plan.parts > 1:
                self._parts = list(zip(*(f.chunk(plan.parts) for f in ring.features), strict=True))
                self._write = Mixer._eager_parts
        elif self._mix is native.mix:
            self._rows = table.coefficients[:, : ring.history].contiguous().unbind(0)
            self._mix = torch.ops.lesa_native.mix_out.default
            self._write = Mixer._native
            if device.type == "cpu":
                self._modulate = torch.ops.lesa_native.mix_modulate_out.default
                self._write_modulated = Mixer._native_modulated
                if table.gated is not None:
                    self._gates, self._write = _by_step(table.gated), Mixer._native_gated
        else:
            self._write, self._write_modulated = Mixer._triton, Mixer._triton_modulated
            if table.gated is not None:
                self._write = Mixer._triton_gated
            self._prepare()
        self._range = nvtx_ranges.mix if table.gated is None else nvtx_ranges.spline_mix

    def _prepare(self) -> None:
        """Launches that are checked at their first step only."""
        from lesa_kernels.mix import prepare_mix  # no Triton on macOS and Windows
        from lesa_kernels.mix_modulate import prepare_mix_modulate
        from lesa_kernels.spline_mix import prepare_spline_mix

        data, (coefficients, bias, _, gated) = self.ring.data, self.table
        if gated is not None:
            self._spline_mix = prepare_spline_mix(
                data, gated.weights, gated.tau, gated.gate, experts=gated.experts, bias=gated.bias
            )
        self._mix = prepare_mix(data, coefficients, bias=bias, band_size=self._band)
        modulate = partial(prepare_mix_modulate, data, coefficients, bias=bias)
        self._modulates = cache(lambda eps: modulate(eps=eps))

    def __call__(self, index: int, out: Tensor, latent: Tensor | None = None) -> Tensor:
        """The forecast of the plan's step `index`, which must be a skipped one."""
        if latent is not None:
            latent = latent.contiguous()
        with self._range:
            self._write(self, index, out, latent)
        return out

    def modulated(
        self,
        index: int,
        modulation: Modulation,
        eps: float,
        out: Tensor,
        feature: Tensor | None = None,
    ) -> Tensor:
        """layer_norm(h) * (1 + scale[s]) + shift[s] of the forecast h; h goes to `feature`, if any.

        See `lesa_kernels.mix_modulate.mix_modulate`.
        """
        with nvtx_ranges.mix:
            self._write_modulated(self, index, modulation, eps, out, feature)
        return out

    def _launch_modulated(
        self, index: int, modulation: Modulation, eps: float, out: Tensor, feature: Tensor | None
    ) -> None:
        table, ring = self.table, self.ring
        self._modulate(
            ring.data, ring.slots, table.coefficients, table.steps[index],
            modulation.scale, modulation.shift, out, bias=table.bias, eps=eps, feature=feature,
        )  # fmt: skip

    def _native_modulated(
        self, index: int, modulation: Modulation, eps: float, out: Tensor, feature: Tensor | None
    ) -> None:
        ring, bias = self.ring, self.plan.of(index)[0].bias
        scale, shift = modulation.rows[index]
        self._modulate(
            ring.data, ring.slots, self._rows[index], bias, scale, shift, eps, out, feature
        )

    def _eager(self, index: int, out: Tensor, latent: Tensor | None) -> None:
        coefficients, own, bias = self.plan.of(index)[0]
        ring = self.ring
        eager.mix_row(ring.features, ring.order, coefficients, out, latent, own, bias)

    def _eager_parts(self, index: int, out: Tensor, latent: Tensor | None) -> None:
        rows = self.plan.of(index)
        outs = out.chunk(len(rows))
        latents = [None] * len(rows) if latent is None else latent.chunk(len(rows))
        for row, features, part, own in zip(rows, self._parts, outs, latents, strict=True):
            coefficients, weight, bias = row
            eager.mix_row(features, self.ring.order, coefficients, part, own, weight, bias)

    def _native(self, index: int, out: Tensor, latent: Tensor | None) -> None:
        _, own, bias = self.plan.of(index)[0]
        ring = self.ring
        self._mix(ring.data, ring.slots, self._rows[index], latent, own, bias, out)

    def _native_gated(self, index: int, out: Tensor, latent: Tensor | None) -> None:
        ring = self.ring
        torch.ops.lesa_native.spline_mix_out.default(
            ring.data, ring.slots, *self._gates[index], out
        )

    def _triton_gated(self, index: int, out: Tensor, latent: Tensor | None) -> None:
        self._spline_mix(self.ring.slots, self.table.steps[index], out)

    def _triton(self, index: int, out: Tensor, latent: Tensor | None) -> None:
        self._mix(self.ring.slots, self.table.steps[index], out, latent)

    def _triton_modulated(
        self, index: int, modulation: Modulation, eps: float, out: Tensor, feature: Tensor | None
    ) -> None:
        ring, step = self.ring, self.table.steps[index]
        self._modulates(eps)(ring.slots, step, modulation.scale, modulation.shift, out, feature)


def _by_step(gated: GatedRows) -> list[tuple[Any, ...]]:
    """Of each step weights, tau, its expert's gate and the bias, for the compiled kernel."""
    *parts, low, high = gated.gate
    experts = gated.experts.tolist()
    rows = zip(gated.weights.unbind(0), gated.tau.unbind(0), gated.bias.tolist(), strict=True)
    return [
        (weights, tau, *(part[expert] for part in parts), low, high, bias)
        for expert, (weights, tau, bias) in zip(experts, rows, strict=True)
    ]
