"""What a kernel refuses, each in one sentence: one that reads a wrong address tells nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from lesa_kernels.errors import LesaError
from lesa_kernels.gate import Gate

__all__ = [
    "FEATURES",
    "check_bias",
    "check_features",
    "check_gate",
    "check_mix",
    "check_rows",
    "check_slots",
    "check_step",
    "check_table",
    "like",
    "plain",
    "require",
    "split_bands",
]

FEATURES = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)
MAX_HISTORY = 8


def require(true: bool, sentence: str) -> None:
    """LesaError unless it holds."""
    if not true:
        raise LesaError(sentence)


def plain(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """Contiguous, of one of the dtypes, on the device."""
    if not tensor.is_contiguous():
        raise LesaError(
            f"{name} has strides {list(tensor.stride())}, the kernel needs a contiguous tensor; "
            f"pass {name}.contiguous()"
        )
    if tensor.dtype not in dtypes:
        raise LesaError(f"{name} is {tensor.dtype}; the kernel takes {_names(dtypes)}")
    if tensor.device != device:
        raise LesaError(f"{name} is on {tensor.device}; move it to {device}, where the others are")


def like(name: str, tensor: Tensor, out: Tensor) -> None:
    """A feature of out's shape."""
    plain(name, tensor, FEATURES, out.device)
    require(
        tensor.shape == out.shape,
        f"{name} has shape {list(tensor.shape)}, but out {list(out.shape)}; they must agree",
    )


def check_slots(slots: Tensor, device: torch.device) -> int:
    """K."""
    plain("slots", slots, (torch.int32,), device)
    require(
        slots.ndim == 1 and 1 <= slots.numel() <= MAX_HISTORY,
        f"slots has shape {list(slots.shape)}; it must be [K] with K = 1..{MAX_HISTORY}",
    )
    return slots.numel()


def check_step(step: Tensor, device: torch.device) -> None:
    """One integer on the device."""
    plain("step", step, INTEGERS, device)
    require(step.numel() == 1, f"step has {step.numel()} elements; it must be one step number")


def check_mix(
    ring: Tensor, slots: Tensor, step: Tensor, out: Tensor, latent: Tensor | None = None
) -> int:
    """K, where all that every mix takes fits together."""
    history = check_features(out, ring, slots)
    if latent is not None:
        like("latent", latent, out)
    check_step(step, out.device)
    _check_overlap(ring, out)
    return history


def check_features(
    feature: Tensor,
    ring: Tensor,
    slots: Tensor,
    name: str = "out",
    dtypes: tuple[torch.dtype, ...] = FEATURES,
) -> int:
    """K, where the ring holds features of this shape."""
    plain(name, feature, FEATURES, feature.device)
    plain("ring", ring, dtypes, feature.device)
    require(
        ring.shape[1:] == feature.shape and ring.ndim > 1,
        f"ring has shape {list(ring.shape)}, but {name} {list(feature.shape)}; "
        f"it must be [N, *{name}.shape]",
    )
    return check_slots(slots, feature.device)


def _check_overlap(ring: Tensor, out: Tensor) -> None:
    offset = out.data_ptr() - ring.data_ptr()
    slot = ring.stride(0) * ring.element_size()
    span = out.numel() * out.element_size()
    inside = -span < offset < ring.shape[0] * slot
    require(
        not inside or not span or (offset % slot == 0 and out.dtype == ring.dtype),
        f"out begins {offset} bytes into the ring, whose slots have {slot} bytes of {ring.dtype}; "
        "pass one of its slots or a tensor outside it",
    )


def check_table(
    table: Tensor, width: int, out: Tensor, band_size: int | None = None
) -> tuple[int, int]:
    """Number and size of the bands."""
    plain("table", table, (torch.float32,), out.device)
    require(
        table.ndim in (2, 3) and table.shape[1] == width,
        f"table has shape {list(table.shape)}; with these slots and latent it must be "
        f"[steps, {width}] or [steps, {width}, bands]",
    )
    return split_bands(table.shape[2] if table.ndim == 3 else 1, band_size, out)


def check_rows(table: Tensor, width: int, out: Tensor, name: str = "table") -> None:
    """A table of one number per step and feature, without bands."""
    plain(name, table, (torch.float32,), out.device)
    require(
        table.ndim == 2 and table.shape[1] == width,
        f"{name} has shape {list(table.shape)}; this kernel takes no bands: with these slots "
        f"it must be [steps, {width}]",
    )


def split_bands(bands: int, band_size: int | None, out: Tensor) -> tuple[int, int]:
    """Number and size of the bands."""
    if band_size is None:
        channels = out.shape[-1] if out.ndim else 1
        require(
            bands > 0 and channels % bands == 0,
            f"table has {bands} bands, which do not divide {channels} channels; give band_size",
        )
        band_size = max(1, channels // bands)
    require(
        bands > 0 and band_size > 0 and out.numel() % (bands * band_size) == 0,
        f"{bands} bands of band_size={band_size} do not divide a feature of {out.numel()} elements",
    )
    return bands, band_size


def check_bias(bias: Tensor | None, table: Tensor, bands: int) -> None:
    """One number per step and band."""
    if bias is None:
        return
    plain("bias", bias, (torch.float32,), table.device)
    require(
        bias.numel() == table.shape[0] * bands,
        f"bias has shape {list(bias.shape)}; it must be [{table.shape[0]}"
        + (f", {bands}]" if bands > 1 else "]"),
    )


def check_gate(gate: Gate, tau: Tensor, weights: Tensor, experts: Tensor | None) -> tuple[int, int]:
    """Inputs and nodes of the gate."""
    device, steps = weights.device, weights.shape[0]
    for name, tensor in (("tau", tau), *zip(gate._fields[:4], gate[:4], strict=True)):
        plain(name, tensor, (torch.float32,), device)
    count, inputs, nodes = gate.projection.shape
    splines = gate.spline.shape[1]
    require(
        gate.shift.shape == gate.base.shape == (count, nodes)
        and gate.spline.shape == (count, splines, nodes)
        and splines > 3
        and gate.low < gate.high,
        "the gate's tensors do not fit together; make it with pack_gate",
    )
    require(
        tau.shape == (steps, inputs),
        f"tau has shape {list(tau.shape)}; with these weights and this gate it must be "
        f"[{steps}, {inputs}]",
    )
    if experts is not None:
        plain("experts", experts, (torch.int32,), device)
        require(
            experts.shape == (steps,),
            f"experts has shape {list(experts.shape)}; it must be [{steps}]",
        )
    return inputs, nodes


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
