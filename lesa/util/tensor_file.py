"""safetensors files from anywhere: looked at before memory is taken, one sentence if wrong."""

from __future__ import annotations

from torch import Tensor

from lesa.errors import LesaError
from lesa.util.files import one_line
from lesa.util.strict_json import parse_json

__all__ = ["read_tensors"]

_WRONG = (LookupError, ValueError, TypeError, RuntimeError, MemoryError, OverflowError)
MOST_HEADER = 16 << 20  # bytes that name the tensors; a forecaster has some thousands


def read_tensors(data: bytes, name: str, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file's content; `name` is what a sentence calls it.

    Raises: LesaError where it is no safetensors file, or a tensor has an unknown dtype.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    what = f"{name} is not a safetensors file"
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(len(data) - 8, MOST_HEADER):
        raise LesaError(f"{what} (a header of {size} bytes in {len(data)}); {remedy}")
    header = parse_json(data[8 : 8 + size], what, remedy)
    try:
        tensors = load(data)
    except (SafetensorError, *_WRONG) as error:
        raise LesaError(f"{what} ({one_line(error)}); {remedy}") from None
    return tensors, dict(header.get("__metadata__") or {})
