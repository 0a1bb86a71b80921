"""What a file of statistics must hold: checked before anything is computed from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from lesa.core import schema
from lesa.core.checks import MOST_STEPS
from lesa.core.forecaster import Tap, check_sigmas
from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.util.strict_json import parse_json

__all__ = ["FORMAT", "MOST", "REMEDY", "described", "unpacked"]

FORMAT = 2
MOST = 4 << 30  # bytes; 32 pictures of 50 steps have 3 MB, of 1000 steps 1.2 GB
LARGEST = 1e30  # of an inner product, whose square must still be a number
REMEDY = "delete it and collect again"
_META = schema.fields(
    {
        "format": schema.whole_number(FORMAT, FORMAT),
        "sigmas": schema.items(schema.number(), 2, MOST_STEPS + 1),
        "tap": schema.choice(*get_args(Tap)),
        "num_latents": schema.whole_number(0, MOST_STEPS + 1),
        "rows": schema.table_of(schema.whole_number(1, 64), 16),
        "prompts": schema.items(schema.text(1_000_000), 1, 1_000_000),
        "setting": schema.text(),
    },
    {"depends_on": schema.table_of(schema.text(), 1000)},
)


def described(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The fields of statistics that a file's metadata tell; LesaError for others."""
    meta = parse_json(metadata.get("lesa", "").encode(), "metadata say nothing of it", REMEDY)
    given = dict(schema.checked(meta, _META, "metadata", REMEDY))
    given.pop("format")
    steps = len(given["sigmas"]) - 1
    try:
        given["sigmas"] = check_sigmas(Schedule.explicit([0], steps), given["sigmas"])
    except LesaError as error:  # whose remedy is for the levels of a call
        raise LesaError(f"{str(error).rpartition(';')[0]}; {REMEDY}") from None
    if given["num_latents"] not in (0, steps, steps + 1) or not given["rows"]:
        told = f"num_latents={given['num_latents']}, rows={given['rows']}"
        raise LesaError(f"{told}: not those of {steps} steps; {REMEDY}")
    return given


def unpacked(packed: Tensor | None, size: int, prompts: int) -> Tensor:
    """Matrices ``[P, M, M]`` of the triangles ``[P, M (M + 1) / 2]``.

    Raises: LesaError unless they are inner products: finite, of the constant with itself 1, and
        none above what its two sides allow.
    """
    length = size * (size + 1) // 2
    fits = packed is not None and packed.ndim == 2 and packed.dtype == torch.float64
    if packed is None or not fits or packed.shape[1] != length or len(packed) % prompts:
        shape = "missing" if packed is None else f"{packed.dtype} {list(packed.shape)}"
        raise LesaError(
            f"gram is {shape}, not float64 [{prompts} pictures or a multiple, {length}]; {REMEDY}"
        )
    rows, columns = torch.triu_indices(size, size)
    joint = packed.new_zeros(len(packed), size, size)
    joint[:, rows, columns] = joint[:, columns, rows] = packed
    sides = joint.diagonal(dim1=1, dim2=2).clamp(0, LARGEST).sqrt()
    most = sides[:, :, None] * sides[:, None] * (1 + 1e-6) + 1e-12
    constant = (joint[:, -1, -1] - 1).abs() < 1e-3
    if not len(joint) or not bool((joint.abs() <= most).all() & constant.all()):
        raise LesaError(f"gram holds values that are no inner products; {REMEDY}")
    return joint
