"""The forecasts of one plan from one ring, on whatever backend is active where the ring lies."""

from __future__ import annotations

import torch
from torch import Tensor

from lesa import backend, eager, ops, ranges
from lesa.plan import Plan
from lesa.ring import Ring

__all__ = ["Mixer"]


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
        features, device = ring.data, ring.data.device
        chosen = backend.active(device)
        wide = features.dtype == torch.float64
        self._table = table = plan.on(device)
        self._modulate = ops.implementation(
            "mix_modulate", features[0], ring.history, {"bias": table.bias}
        )
        self._write = Mixer._eager  # a bound method would make a cycle that keeps the ring alive
        if chosen == "triton" and not wide and ring.history <= 8:
            self._mix = ops.implementation("mix", features[0], ring.history)
            self._write = Mixer._triton
        elif chosen == "native" and not wide:
            self._rows = table.coefficients[:, : ring.history].contiguous().unbind(0)
            self._write = Mixer._native

    def __call__(self, index: int, out: Tensor, latent: Tensor | None = None) -> Tensor:
        """The forecast of the plan's step `index`, which must be a skipped one."""
        if latent is not None:
            latent = latent.contiguous()
        with ranges.mix:
            self._write(self, index, out, latent)
        return out

    def modulated(
        self,
        index: int,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        out: Tensor,
        feature: Tensor | None = None,
    ) -> Tensor:
        """layer_norm(h) * (1 + scale[s]) + shift[s] of the forecast h; h goes to `feature`, if any.

        See `lesa_kernels.mix_modulate.mix_modulate`.
        """
        table, ring = self._table, self.ring
        step = table.steps[index]
        with ranges.mix:
            return self._modulate(
                ring.data, ring.slots, table.coefficients, step, scale, shift, out,
                bias=table.bias, eps=eps, feature=feature,
            )  # fmt: skip

    def _eager(self, index: int, out: Tensor, latent: Tensor | None) -> None:
        coefficients, own, bias = self.plan.row(index)
        ring = self.ring
        eager.mix_row(ring.features, ring.order, coefficients, out, latent, own, bias)

    def _native(self, index: int, out: Tensor, latent: Tensor | None) -> None:
        _, own, bias = self.plan.row(index)
        ring = self.ring
        torch.ops.lesa_native.mix_out(
            ring.data, ring.slots, self._rows[index], latent, own, bias, out
        )

    def _triton(self, index: int, out: Tensor, latent: Tensor | None) -> None:
        table, ring = self._table, self.ring
        self._mix(
            ring.data,
            ring.slots,
            table.coefficients,
            table.steps[index],
            out,
            latent=latent,
            bias=table.bias,
        )
