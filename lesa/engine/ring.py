"""The cache: one preallocated tensor of K features, written in place."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lesa.engine import nvtx_ranges
from lesa.errors import LesaError

__all__ = ["Ring"]


class Ring:
    """The K newest features, `data` [K, *feature_shape], in the features' own dtype and device.

    `push` overwrites the oldest feature. A ring keeps nothing but its `data`: the K * K slot
    numbers of a device are shared by all rings there.

    Args:
        history: K, at least 1.
        like: a feature that gives shape, dtype and device.
        data: memory [K, *like.shape] to use instead of its own, for a graph that reads it.

    Attributes:
        order: slot of the feature pushed 0, 1, ..., K - 1 pushes ago, as Python ints.
        slots: the same as an int32 tensor [K] on the device, for kernels.
        pushed: how many features have entered.

    Raises:
        LesaError: `history` is below 1, or a pushed feature has another shape, dtype or device.
    """

    def __init__(self, history: int, like: Tensor, data: Tensor | None = None) -> None:
        if history < 1:
            raise LesaError(f"history={history}: a ring holds at least 1 feature; give 1 or more")
        self.history = history
        with torch.inference_mode(False):  # so that it can be written in either mode
            shape = (history, *like.shape)
            if data is None:
                data = torch.empty(shape, dtype=like.dtype, device=like.device)
            self.data = data
            self.features = self.data.unbind(0)
        self._orders = _orders(history)
        self._slots = _slots(history, like.device)
        self.pushed = 0
        self._newest(history - 1)

    def push(self, feature: Tensor) -> None:
        """Copy `feature` over the oldest one."""
        if not self.matches(feature):
            raise LesaError(
                f"feature={_describe(feature)}: the ring holds {_describe(self.data[0])}; "
                "make a new ring for it"
            )
        self._newest((self.order[0] + 1) % self.history)
        with nvtx_ranges.push:
            self.features[self.order[0]].copy_(feature.detach())
        self.pushed += 1

    def matches(self, feature: Tensor) -> bool:
        """Whether `feature` fits into this ring."""
        data = self.data
        return (
            feature.shape == data.shape[1:]
            and feature.dtype == data.dtype
            and feature.device == data.device
        )

    def reset(self) -> None:
        """Forget all features; the memory stays."""
        self.pushed = 0
        self._newest(self.history - 1)

    def _newest(self, slot: int) -> None:
        """Let `slot` be the first one of the order."""
        self.order, self.slots = self._orders[slot], self._slots[slot]

    @property
    def count(self) -> int:
        """How many features it holds, at most K."""
        return min(self.pushed, self.history)

    @property
    def nbytes(self) -> int:
        """Bytes of the K features."""
        return self.data.numel() * self.data.element_size()


@cache
def _orders(history: int) -> tuple[tuple[int, ...], ...]:
    """The slots newest first, for each place of the newest feature."""
    return tuple(tuple((head - age) % history for age in range(history)) for head in range(history))


@cache
def _slots(history: int, device: torch.device) -> tuple[Tensor, ...]:
    """`_orders` on a device. Copied there once in a process: each copy waits for the device."""
    with torch.inference_mode(False):
        return torch.tensor(_orders(history), dtype=torch.int32, device=device).unbind(0)


def _describe(feature: Tensor) -> str:
    return f"{tuple(feature.shape)} {feature.dtype} on {feature.device}"
