"""Forecasts from one ring, written on whatever backend is active where the ring lies."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lesa import ops
from lesa.engine import nvtx_ranges
from lesa.engine.modulation import Modulation
from lesa.engine.ring import Ring
from lesa.engine.step_table import Row, StepTable, gates_by_step
from lesa.errors import LesaError
from lesa.ops import eager, native

__all__ = ["Mixer"]


class Mixer:
    """`mixer(s, out)` writes h_hat_s = sum_k c[s, k] ring[k] (+ c_latent x_s) (+ bias_s) to `out`.

    What varies from step to step lies on the device already: no step copies from the host or waits
    for the device. It calls the kernels themselves, since the dispatcher would double the time that
    the host takes; `lesa.ops` is for everybody else.

    Attributes:
        ring: what it reads.
        writer: how the active backend writes a forecast.

    Raises:
        LesaError: LESA_BACKEND forces a backend that does not work on the ring's device, or the
            ring's batch does not divide into the table's guidance parts.
    """

    def __init__(self, table: StepTable, ring: Ring) -> None:
        self.ring, self.writer = ring, _writer(table, ring)
        self._write = self.writer.range.around(self.writer.mix)
        self._write_modulated = nvtx_ranges.mix.around(self.writer.modulate)

    def __call__(self, index: int, out: Tensor, latent: Tensor | None = None) -> Tensor:
        """The forecast of the table's step `index`, which must be a skipped one."""
        self._write(index, out, None if latent is None else latent.contiguous())
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
        self._write_modulated(index, modulation, eps, out, feature)
        return out


def _writer(table: StepTable, ring: Ring) -> _Writer:
    """The writer of the active backend for this table and this ring."""
    feature = ring.features[0]
    if len(feature) % table.parts:
        raise LesaError(
            f"batch={len(feature)}: it does not hold {table.parts} guidance parts; run it without "
            "coefficients of their own"
        )
    band = _band(table, feature)
    options = {} if band is None else {"band_size": band}
    mix = ops.implementation("mix", feature, ring.history, options)
    gated = table.on(feature.device).gated is not None
    if mix is eager.mix or feature.dtype == torch.float64:  # whose rows stay float64
        return _EagerParts(table, ring) if table.parts > 1 else _Eager(table, ring)
    if mix is not native.mix:
        return _TritonGated(table, ring) if gated else _Triton(table, ring)
    if feature.device.type != "cpu":
        return _Native(table, ring)
    return _NativeGated(table, ring) if gated else _NativeOnHost(table, ring)


def _band(table: StepTable, feature: Tensor) -> int | None:
    """To a kernel the guidance parts of a batch are bands: numbers in one of them."""
    return None if table.parts == 1 else feature.numel() // table.parts


class _Writer:
    """What all backends have: the modulated forecast by the operator's own implementation.

    It does not refer to itself: a cycle would keep the ring alive.
    """

    range: ClassVar[nvtx_ranges.Range] = nvtx_ranges.mix

    def __init__(self, table: StepTable, ring: Ring) -> None:
        self.ring, self.rows = ring, table.rows
        self.on_device = table.on(ring.data.device)
        self._modulate: Callable[..., Any] = ops.implementation(
            "mix_modulate", ring.features[0], ring.history, {"bias": self.on_device.bias}
        )

    def row(self, index: int) -> Row:
        """The coefficients of a skipped step, the same for all guidance parts."""
        rows = self.rows[index]
        assert rows is not None, f"step {index} is full"
        return rows[0]

    def mix(self, index: int, out: Tensor, latent: Tensor | None) -> None:
        """Write the forecast of a skipped step to `out`."""
        raise NotImplementedError

    def modulate(
        self, index: int, modulation: Modulation, eps: float, out: Tensor, feature: Tensor | None
    ) -> None:
        """Write the modulated forecast of a skipped step to `out`."""
        table, ring = self.on_device, self.ring
        self._modulate(
            ring.data, ring.slots, table.coefficients, table.steps[index],
            modulation.scale, modulation.shift, out, bias=table.bias, eps=eps, feature=feature,
        )  # fmt: skip


class _Eager(_Writer):
    """Operations of PyTorch, one feature after the other."""

    def mix(self, index: int, out: Tensor, latent: Tensor | None) -> None:
        coefficients, own, bias = self.row(index)
        ring = self.ring
        eager.mix_row(ring.features, ring.order, coefficients, out, latent, own, bias)


class _EagerParts(_Writer):
    """The same for each guidance part of the batch, which has a row of its own."""

    def __init__(self, table: StepTable, ring: Ring) -> None:
        super().__init__(table, ring)
        self._parts = list(zip(*(f.chunk(table.parts) for f in ring.features), strict=True))

    def mix(self, index: int, out: Tensor, latent: Tensor | None) -> None:
        rows = self.rows[index]
        assert rows is not None, f"step {index} is full"
        outs = out.chunk(len(rows))
        latents = [None] * len(rows) if latent is None else latent.chunk(len(rows))
        for row, features, part, own in zip(rows, self._parts, outs, latents, strict=True):
            coefficients, weight, bias = row
            eager.mix_row(features, self.ring.order, coefficients, part, own, weight, bias)


class _Native(_Writer):
    """The compiled kernels."""

    def __init__(self, table: StepTable, ring: Ring) -> None:
        super().__init__(table, ring)
        self._weights = self.on_device.coefficients[:, : ring.history].contiguous().unbind(0)
        self._mix = torch.ops.lesa_native.mix_out.default

    def mix(self, index: int, out: Tensor, latent: Tensor | None) -> None:
        _, own, bias = self.row(index)
        ring = self.ring
        self._mix(ring.data, ring.slots, self._weights[index], latent, own, bias, out)


class _NativeOnHost(_Native):
    """Those of the CPU, which also have the modulation."""

    def __init__(self, table: StepTable, ring: Ring) -> None:
        super().__init__(table, ring)
        self._modulate = torch.ops.lesa_native.mix_modulate_out.default

    def modulate(
        self, index: int, modulation: Modulation, eps: float, out: Tensor, feature: Tensor | None
    ) -> None:
        ring, bias = self.ring, self.row(index).bias
        scale, shift = modulation.rows[index]
        self._modulate(
            ring.data, ring.slots, self._weights[index], bias, scale, shift, eps, out, feature
        )


class _NativeGated(_NativeOnHost):
    """The paper's form, whose gate the compiled kernel evaluates."""

    range = nvtx_ranges.spline_mix

    def __init__(self, table: StepTable, ring: Ring) -> None:
        super().__init__(table, ring)
        assert self.on_device.gated is not None
        self._gates = gates_by_step(self.on_device.gated)
        self._mix = torch.ops.lesa_native.spline_mix_out.default

    def mix(self, index: int, out: Tensor, latent: Tensor | None) -> None:
        ring = self.ring
        self._mix(ring.data, ring.slots, *self._gates[index], out)


class _Triton(_Writer):
    """Launches of Triton kernels that are checked at their first step only."""

    def __init__(self, table: StepTable, ring: Ring) -> None:
        from lesa_kernels.mix import prepare_mix  # no Triton on macOS and Windows
        from lesa_kernels.mix_modulate import prepare_mix_modulate

        super().__init__(table, ring)
        data, (coefficients, bias, self._steps, _) = ring.data, self.on_device
        band = _band(table, ring.features[0])
        self._mix = prepare_mix(data, coefficients, bias=bias, band_size=band)
        modulate = partial(prepare_mix_modulate, data, coefficients, bias=bias)
        self._modulates = cache(lambda eps: modulate(eps=eps))

    def mix(self, index: int, out: Tensor, latent: Tensor | None) -> None:
        self._mix(self.ring.slots, self._steps[index], out, latent)

    def modulate(
        self, index: int, modulation: Modulation, eps: float, out: Tensor, feature: Tensor | None
    ) -> None:
        launch = self._modulates(eps)
        launch(
            self.ring.slots, self._steps[index], modulation.scale, modulation.shift, out, feature
        )


class _TritonGated(_Triton):
    """The paper's form, whose gate the kernel evaluates."""

    range = nvtx_ranges.spline_mix

    def __init__(self, table: StepTable, ring: Ring) -> None:
        from lesa_kernels.spline_mix import prepare_spline_mix

        super().__init__(table, ring)
        gated = self.on_device.gated
        assert gated is not None
        self._spline_mix = prepare_spline_mix(
            ring.data, gated.weights, gated.tau, gated.gate, experts=gated.experts, bias=gated.bias
        )

    def mix(self, index: int, out: Tensor, latent: Tensor | None) -> None:
        self._spline_mix(self.ring.slots, self._steps[index], out)
