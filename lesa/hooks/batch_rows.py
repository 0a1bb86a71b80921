"""The rows of one batch that belong to one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lesa.core.checks import shown, whole
from lesa.errors import LesaError
from lesa.hooks.model_specs import PROMPTS, ModelSpec

__all__ = ["join_rows", "pick_arguments", "pick_rows", "rows_in", "rows_of_parts"]

MOST_ROWS = 1 << 20  # of one call; a larger number is a slip


def rows_in(latent: Any) -> int:
    """Rows of the batch that a latent is, a tensor or a list with one for each; 0 if neither."""
    return len(latent) if isinstance(latent, (Tensor, list, tuple)) else 0


def pick_rows(value: Any, rows: Sequence[int], total: int) -> Any:
    """Some rows of a tensor [total, ...], and of the tensors in a dict, a list or a tuple; anything
    else is every request's.

    Neighbouring rows are a view.
    """
    if isinstance(value, Tensor):
        if value.ndim == 0 or len(value) != total:
            return value
        if list(rows) == list(range(rows[0], rows[0] + len(rows))):
            return value.narrow(0, rows[0], len(rows))
        return value[_numbers(tuple(rows), value.device)]
    if isinstance(value, dict):
        return {name: pick_rows(part, rows, total) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(pick_rows(part, rows, total) for part in value)
    return value


@lru_cache(maxsize=256)
def _numbers(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """These numbers on a device; copied there once, since each copy waits for it."""
    with torch.inference_mode(False):
        return torch.tensor(rows, device=device)


def pick_arguments(
    given: Mapping[str, Any], spec: ModelSpec, rows: Sequence[int], total: int
) -> dict[str, Any]:
    """The arguments of a call of the denoiser for some rows of its batch.

    A list with a part for every row (latents and prompts of Z-Image, the lengths of prompts) is
    picked from; other lists hold tensors that have a row each, as ControlNet residuals do.
    """
    found = {}
    for name, value in given.items():
        if name in spec.unbatched:
            found[name] = value
        elif isinstance(value, list) and len(value) == total and _by_row(name, value, spec, total):
            found[name] = [value[row] for row in rows]
        else:
            found[name] = pick_rows(value, rows, total)
    return found


def _by_row(name: str, value: list[Any], spec: ModelSpec, total: int) -> bool:
    """Whether a list has a part for every row of the batch: by its name, or where not all of its
    parts are tensors that have a row each."""
    named = name == spec.latent or name.startswith((*spec.conditioning, *PROMPTS))
    return named or not all(
        isinstance(part, Tensor) and part.ndim and len(part) in (1, total) for part in value
    )


def join_rows(parts: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> Tensor:
    """One batch of the parts, whose rows go where `rows` says: the inverse of `pick_rows`."""
    joined = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    order = [row for part in rows for row in part]
    if order == sorted(order):
        return joined
    places = torch.tensor(order, device=joined.device).argsort()
    return joined[places]


def rows_of_parts(
    count: int, rows: Sequence[int | Sequence[int]] | None
) -> tuple[Sequence[int], ...]:
    """The rows of each of `count` parts of a batch, from how many or which ones each has; one each
    if None.

    Raises: LesaError unless all of them together are a batch.
    """
    given: Any = [1] * count if rows is None else rows
    if not isinstance(given, (list, tuple)) or len(given) != count:
        raise LesaError(f"rows={shown(rows)}: not one entry for each of {count} slots; give that")
    found: list[list[int]] = []
    for entry in given:
        first = sum(map(len, found))
        listed = isinstance(entry, (list, tuple, range))
        number = 0 if listed else whole("rows", entry, 1, MOST_ROWS)
        own = [whole("rows", row, 0, MOST_ROWS) for row in entry] if listed else None
        found.append([*range(first, first + number)] if own is None else own)
    together = sorted(row for part in found for row in part)
    if together != list(range(len(together))) or not all(found):
        raise LesaError(f"rows={shown(rows)}: not every row of a batch once; give each to one slot")
    return tuple(found)
