"""What a norm's modulation is at each step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

__all__ = ["Modulation"]


@dataclass(frozen=True, eq=False)
class Modulation:
    """Scale and shift [S, B, C] of all steps, two halves of one tensor [S, B, 2 C]."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, both: Tensor) -> Modulation:
        """From the tensor [S, B, 2 C]."""
        return cls(*both.chunk(2, dim=-1))

    @cached_property
    def rows(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Both by step."""
        return tuple(zip(self.scale.unbind(0), self.shift.unbind(0), strict=True))
