"""The operators `lesa::*` as torch knows them: schemas, fake forms, checks and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lesa.errors import LesaError
from lesa.ops.dispatch import implementation


def _check(
    ring: Tensor,
    slots: Tensor,
    table: Tensor | None = None,
    *,
    latent: Tensor | None = None,
    name: str = "table",
    bands: bool = False,
) -> None:
    """What no backend may read otherwise: LesaError unless rows and slots fit together."""
    if table is not None:
        width = len(slots) + (latent is not None)
        if table.ndim not in ((2, 3) if bands else (2,)) or table.shape[1] != width:
            given = "slots and latent" if latent is not None else "slots"
            banded = f", or [steps, {width}, bands]" if bands else ""
            raise LesaError(
                f"{name} has shape {list(table.shape)}; with these {given} it must be "
                f"[steps, {width}]{banded}"
            )
    if slots.device.type == "cpu" and len(slots):
        low, high = int(slots.min()), int(slots.max())
        if low < 0 or high >= len(ring):
            raise LesaError(f"slots name {low} to {high}; the ring has slots 0 to {len(ring) - 1}")


def _define(name: str, schema: str, mutates: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    return torch.library.custom_op(f"lesa::{name}", mutates_args=mutates, schema=schema)


_MIX = "Tensor ring, Tensor slots, Tensor table, Tensor step"
_MIX_OPTIONS = "Tensor? latent=None, Tensor? bias=None, SymInt? band_size=None"
_SPLINE = (
    "Tensor ring, Tensor slots, Tensor weights, Tensor tau, Tensor projection, Tensor shift, "
    "Tensor base, Tensor spline, float low, float high, Tensor step"
)


@_define("mix_out", f"({_MIX}, Tensor(a!) out, {_MIX_OPTIONS}) -> ()", ("out",))
def _mix_out(ring, slots, table, step, out, latent=None, bias=None, band_size=None):
    _check(ring, slots, table, latent=latent, bands=True)
    options = dict(latent=latent, bias=bias)
    if table.ndim == 3:
        options["band_size"] = band_size
    implementation("mix", out, len(slots), options)(ring, slots, table, step, out, **options)


# No defaults: the dispatcher would leave them out, and autograd could not count the arguments.
@_define("mix", f"({_MIX}, Tensor? latent, Tensor? bias, SymInt? band_size) -> Tensor")
def _mix(ring, slots, table, step, latent, bias, band_size):
    out = torch.empty_like(ring[0])
    _mix_out(ring, slots, table, step, out, latent, bias, band_size)
    return out


@_define("spline_mix_out", f"({_SPLINE}, Tensor(a!) out, Tensor? experts=None, "
         "Tensor? bias=None) -> ()", ("out",))  # fmt: skip
def _spline_mix_out(ring, slots, weights, tau, projection, shift, base, spline, low, high, step,
                    out, experts=None, bias=None):  # fmt: skip
    from lesa_kernels.gate import Gate

    _check(ring, slots, weights, name="weights")
    gate = Gate(projection, shift, base, spline, low, high)
    run = implementation("spline_mix", out, len(slots))
    run(ring, slots, weights, tau, gate, step, out, experts=experts, bias=bias)


@_define("spline_mix", f"({_SPLINE}, Tensor? experts=None, Tensor? bias=None) -> Tensor")
def _spline_mix(ring, slots, weights, tau, projection, shift, base, spline, low, high, step,
                experts=None, bias=None):  # fmt: skip
    out = torch.empty_like(ring[0])
    _spline_mix_out(ring, slots, weights, tau, projection, shift, base, spline, low, high, step,
                    out, experts, bias)  # fmt: skip
    return out


_MODULATE = f"{_MIX}, Tensor scale, Tensor shift"
_NORM_OPTIONS = "Tensor? bias=None, float eps=1e-6"


@_define("mix_modulate_out", f"({_MODULATE}, Tensor(a!) out, {_NORM_OPTIONS}) -> ()", ("out",))
def _mix_modulate_out(ring, slots, table, step, scale, shift, out, bias=None, eps=1e-6):
    _check(ring, slots, table)
    run = implementation("mix_modulate", out, len(slots), {"bias": bias})
    run(ring, slots, table, step, scale, shift, out, bias=bias, eps=eps)


# An operator of its own: torch 2.10 and 2.11 cannot find a mutated argument that is left out.
@_define("mix_modulate_and_feature_out", f"({_MODULATE}, Tensor(a!) out, Tensor(b!) feature, "
         f"{_NORM_OPTIONS}) -> ()", ("out", "feature"))  # fmt: skip
def _mix_modulate_and_feature_out(ring, slots, table, step, scale, shift, out, feature, bias=None,
                                  eps=1e-6):  # fmt: skip
    _check(ring, slots, table)
    run = implementation("mix_modulate", out, len(slots), {"bias": bias})
    run(ring, slots, table, step, scale, shift, out, bias=bias, eps=eps, feature=feature)


@_define("mix_modulate", f"({_MODULATE}, {_NORM_OPTIONS}) -> Tensor")
def _mix_modulate(ring, slots, table, step, scale, shift, bias=None, eps=1e-6):
    out = torch.empty_like(ring[0])
    _mix_modulate_out(ring, slots, table, step, scale, shift, out, bias, eps)
    return out


@_define("gram_out", "(Tensor feature, Tensor ring, Tensor slots, Tensor(a!) out, "
         "Tensor? base=None) -> ()", ("out",))  # fmt: skip
def _gram_out(feature, ring, slots, out, base=None):
    _check(ring, slots)
    implementation("gram", feature, len(slots))(feature, ring, slots, out, base=base)


@_define("gram", "(Tensor feature, Tensor ring, Tensor slots, Tensor? base=None, "
         "SymInt samples=1) -> Tensor")  # fmt: skip
def _gram(feature, ring, slots, base=None, samples=1):
    out = _gram_shaped(feature, ring, slots, base, samples)
    _gram_out(feature, ring, slots, out, base)
    return out


@_define("mix_backward", "(Tensor grad, Tensor ring, Tensor slots, Tensor table, Tensor step, "
         "Tensor? latent, SymInt? band_size, bool features, bool rows) -> "
         "(Tensor, Tensor, Tensor, Tensor)")  # fmt: skip
def _mix_backward(grad, ring, slots, table, step, latent, band_size, features, rows):
    run = implementation("mix_backward", grad, len(slots))
    return run(grad, ring, slots, table, step, latent, band_size, features, rows)


_IN_PLACE = ("mix_out", "spline_mix_out", "mix_modulate_out", "mix_modulate_and_feature_out",
             "gram_out")  # fmt: skip
for _name in _IN_PLACE:
    torch.library.register_fake(f"lesa::{_name}", lambda *_, **__: None)
for _name in ("mix", "spline_mix", "mix_modulate"):
    torch.library.register_fake(f"lesa::{_name}", lambda ring, *_, **__: torch.empty_like(ring[0]))


@torch.library.register_fake("lesa::gram")
def _gram_shaped(feature, ring, slots, base=None, samples=1):
    width = slots.shape[0] + (2 if base is None else 3)
    return feature.new_empty(samples, width, dtype=torch.float64)


@torch.library.register_fake("lesa::mix_backward")
def _(grad, ring, slots, table, step, latent, band_size, features, rows):
    none, width = grad.new_empty(0), table.shape[2:]
    return (
        torch.empty_like(ring) if features else none,
        torch.empty_like(latent) if features and latent is not None else grad.new_empty(0),
        torch.empty_like(table) if rows else grad.new_empty(0),
        table.new_empty(table.shape[0], *width) if rows else grad.new_empty(0),
    )


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.band_size = inputs
    ctx.save_for_backward(*tensors)


def _mix_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ring, slots, table, step, latent, bias = ctx.saved_tensors
    of_ring, _, of_table, _, of_latent, of_bias, _ = ctx.needs_input_grad
    found = torch.ops.lesa.mix_backward(
        grad.contiguous(), ring, slots, table, step, latent, ctx.band_size,
        of_ring or of_latent, of_table or of_bias,
    )  # fmt: skip
    rings, latents, tables, biases = found
    return (
        rings if of_ring else None,
        None,
        tables if of_table else None,
        None,
        latents if of_latent else None,
        biases.reshape(bias.shape) if of_bias else None,
        None,
    )


torch.library.register_autograd("lesa::mix", _mix_gradients, setup_context=_keep_for_backward)
