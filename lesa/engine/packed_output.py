"""Outputs of several tensors (video and sound, a list of pictures) as one feature."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["PackedOutput"]


class PackedOutput:
    """How the tensors of an output lie one behind the other; it keeps none of them.

    Args:
        output: any nesting of tuples, lists, dicts and model outputs, whose leaves are tensors of
            one dtype on one device, or None.

    Raises:
        TypeError: it holds something else.
    """

    def __init__(self, output: Any) -> None:
        leaves, self._layout = pytree.tree_flatten(output)
        tensors = [leaf for leaf in leaves if leaf is not None]
        if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise TypeError("an output of other things than tensors")
        if len({(tensor.dtype, tensor.device) for tensor in tensors}) > 1:
            raise TypeError("an output of tensors of several dtypes or devices")
        self._shapes = [None if leaf is None else leaf.shape for leaf in leaves]
        sizes = [0 if shape is None else shape.numel() for shape in self._shapes]
        self._places = [*pairwise(accumulate(sizes, initial=0))]

    @staticmethod
    def pack(output: Any) -> Tensor:
        """The tensors of an output: [1, elements of all of them together]."""
        tensors = [leaf for leaf in pytree.tree_leaves(output) if leaf is not None]
        return torch.cat([tensor.detach().flatten() for tensor in tensors])[None]

    def rebuild(self, feature: Tensor) -> Any:
        """An output like the packed one, whose tensors are views of the feature's parts."""
        flat = feature[0]
        leaves = [
            None if shape is None else flat[start:end].view(shape)
            for shape, (start, end) in zip(self._shapes, self._places, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self._layout)
