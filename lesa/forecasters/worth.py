"""What a calibrated list is worth: how near its pictures come to the plain run's, and how fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lesa.core import schema
from lesa.errors import LesaError

# dB that stand for identical pictures, whose PSNR is infinite, which JSON cannot say. Pictures that
# differ in the last bits of float32 are at about 150 dB.
IDENTICAL = 200.0
_DECIBELS = schema.number(-IDENTICAL, IDENTICAL)
_FAR = schema.maybe(schema.number(0.0, 100.0))
STORED = schema.fields(
    {
        "mean": _DECIBELS,
        "p10": _DECIBELS,
        "minimum": _DECIBELS,
        "pictures": schema.whole_number(1, 10**9),
        "validated": schema.truth,
    },
    {"lpips_mean": _FAR, "lpips_max": _FAR, "share": schema.maybe(schema.number(0.0, 1000.0))},
)


@dataclass(frozen=True)
class Worth:
    """What was measured of a list by accelerated runs against plain ones of the same seeds.

    Args:
        mean: mean over the pictures of their PSNR in dB, of decoded floats in [0, 1].
        p10: its 10th percentile, which nine pictures of ten reach.
        minimum: that of the worst picture.
        pictures: how many were measured.
        validated: whether prompts that the fit had not seen are among them.
        lpips_mean: mean LPIPS, None where no backbone was at hand.
        lpips_max: that of the worst picture.
        share: seconds of a skipped step over those of a full one; None if that was not measured.

    Raises:
        LesaError: a value is of another type or beyond any size in use, or p10 is below minimum.
    """

    mean: float
    p10: float
    minimum: float
    pictures: int
    validated: bool
    lpips_mean: float | None = None
    lpips_max: float | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        schema.checked(asdict(self), STORED, "worth", "measure it again")
        if self.minimum > min(self.mean, self.p10) + 1e-6:  # of equal values, up to rounding
            raise LesaError(
                f"worth.minimum={self.minimum}: above p10={self.p10} or mean={self.mean}; measure "
                "it again"
            )

    @classmethod
    def of(
        cls,
        decibels: Sequence[float],
        *,
        validated: bool,
        lpips: Sequence[float] | None = None,
        share: float | None = None,
    ) -> Worth:
        """That of a list whose pictures have these PSNR, infinite ones counted as IDENTICAL, and
        these LPIPS; LesaError where there is none, or one that is not a number."""
        if not len(decibels):
            raise LesaError("decibels=[]: no picture was measured; give at least one")
        found = torch.tensor(list(decibels), dtype=torch.float64, device="cpu").clamp(max=IDENTICAL)
        far = torch.tensor(list(lpips or ()), dtype=torch.float64, device="cpu")
        looked = lpips is not None
        return cls(
            mean=float(found.mean()),
            p10=float(found.quantile(0.1)),
            minimum=float(found.min()),
            pictures=len(found),
            validated=validated,
            lpips_mean=float(far.mean()) if looked else None,
            lpips_max=float(far.max()) if looked else None,
            share=share,
        )

    def to_dict(self) -> dict[str, Any]:
        """Its fields, ready for JSON."""
        return asdict(self)


def speedup(full_steps: float, num_steps: int, share: float | None = None) -> float:
    """Denoising times faster than the plain run, S / (A + share (S - A)) of a run with A full
    steps; `share`, of a skipped step, is 0 where it is not known."""
    return num_steps / (full_steps + (share or 0.0) * (num_steps - full_steps))
