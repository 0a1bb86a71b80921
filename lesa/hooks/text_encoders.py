"""Text encoders for a batch that holds the same prompts again and again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["encode_once"]


@contextmanager
def encode_once(pipe: Any, rows: int) -> Iterator[None]:
    """Let the text encoders of a pipeline compute every different row of tokens once, and at most
    so many rows at a time; what they return is as long as before."""
    with ExitStack() as stack:
        for module in _encoders(pipe):
            own = module.__dict__.get("forward")  # of accelerate, which offloads it
            module.forward = _once(module.forward, rows)
            stack.callback(_restore, module, own)
        yield


def _encoders(pipe: Any) -> list[nn.Module]:
    config = getattr(pipe, "config", None) or {}
    parts = [getattr(pipe, name, None) for name in config if name.startswith("text_encoder")]
    return [part for part in dict.fromkeys(parts) if isinstance(part, nn.Module)]


def _restore(module: nn.Module, own: Any) -> None:
    del module.forward
    if own is not None:
        module.forward = own


def _once(forward: Callable[..., Any], rows: int) -> Callable[..., Any]:
    cached = "use_cache" in inspect.signature(forward).parameters

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _is_tensor(leaf)]
        different = _different(tensors)
        if different is None or len(different[0]) == len(tensors[0]) <= rows:
            return forward(*args, **kwargs)
        chosen, places = different
        if cached:  # a language model's keys and values, which no pipeline asks for
            kwargs = {"use_cache": False, **kwargs}
        parts = []
        for start in range(0, len(chosen), rows):
            some = chosen[start : start + rows]
            own_args, own_kwargs = _rows_of((args, kwargs), some)
            parts.append((len(some), forward(*own_args, **own_kwargs)))
        return _joined(parts, places) if _are_rows(parts) else forward(*args, **kwargs)

    return wrapped


def _rows_of(value: Any, rows: list[int]) -> Any:
    return pytree.tree_map(lambda leaf: leaf[rows] if _is_tensor(leaf) else leaf, value)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _different(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]] | None:
    """The first of each kind of row, and for every row which of these it equals; None where the
    tensors are not tokens and masks of one batch."""
    tokens = all(tensor.ndim and not tensor.is_floating_point() for tensor in tensors)
    if not tokens or len({len(tensor) for tensor in tensors}) != 1:
        return None
    rows = zip(*(_flat(tensor).tolist() for tensor in tensors), strict=True)
    known: dict[Any, int] = {}
    places: list[int] = []
    chosen: list[int] = []
    for at, row in enumerate(rows):
        key = tuple(map(tuple, row))
        if key not in known:
            known[key] = len(chosen)
            chosen.append(at)
        places.append(known[key])
    return chosen, places


def _flat(tensor: Tensor) -> Tensor:
    """A row of numbers for each row of the batch, which may be one number, as a length is."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]


def _are_rows(parts: Sequence[tuple[int, Any]]) -> bool:
    """Whether all that was returned are tensors with a row per row of the batch, or None."""
    return all(
        leaf is None or (_is_tensor(leaf) and leaf.ndim and len(leaf) == count)
        for count, output in parts
        for leaf in pytree.tree_leaves(output)
    )


def _joined(parts: Sequence[tuple[int, Any]], places: Sequence[int]) -> Any:
    flat = [pytree.tree_flatten(output) for _, output in parts]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    joined = [
        None if column[0] is None else torch.cat(column)[torch.tensor(places)] for column in columns
    ]
    return pytree.tree_unflatten(joined, flat[0][1])
