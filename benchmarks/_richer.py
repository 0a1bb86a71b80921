"""Rollouts with more than lesa's have, to measure whether it would pay: coefficients per group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import pi, sqrt

import torch
from torch import Tensor

from lesa.training.rollout import Rollout, Tails, Visit
from lesa.training.row_fit import guided, ridge_fit


@dataclass
class GroupedRollout(Rollout):
    """A row of coefficients of its own for every group of a feature's elements.

    groups: "channel", or as many bands of spatial frequency as there are `edges` plus one; an
    edge is a radius in the plane of the 2-D DCT-II, 1 at the highest frequency of one axis.
    Fits and applies the guided sum, so one row of a picture at a time (FLUX, Qwen-Image).
    """

    groups: str = "channel"
    edges: tuple[float, ...] = ()
    grouped: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # [groups, regressors]

    def forecast(
        self,
        at: Visit,
        latent: Tensor,
        base: tuple[Tensor, Tensor] | None,
        tails: Tails | None = None,
        fitted: Sequence[int] | None = None,
    ) -> Tensor:
        """As in Rollout, group by group; of the output tap alone."""
        ring, rows = self.state.rings[at.branch], self.result.coefficients[at.branch]
        prior = rows[at.step, [*range(len(ring)), rows.shape[1] - 1]]
        regressors = [*ring, latent]
        bands, place = self._split(regressors)
        key = at.branch, at.step
        if not self.spec.frozen:
            some = slice(None) if fitted is None else [*fitted]
            seen = [guided(part[:, some], at.shares) for part in regressors]
            assert base is not None
            target = self._target(at, guided(base[1], at.shares), latent[0] - base[0])[some]
            wanted, (parts, _) = self._split([target])[0][0], self._split(seen)
            self.grouped[key] = torch.stack(
                [
                    ridge_fit(
                        [p[..., place == g] for p in parts],
                        wanted[..., place == g],
                        prior,
                        self.spec.ridge,
                    )
                    for g in range(int(place.max()) + 1)
                ]
            )
        weights = self.grouped[key].float()
        mixed = sum(weights[place, k] * band for k, band in enumerate(bands))
        return self._join(mixed, ring[0]).to(ring[0].dtype)

    def _split(self, parts: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Each part in a basis whose last dimensions are elements of a group, and the groups."""
        if self.groups == "channel":  # packed latents [..., tokens, channels]
            return [part.float() for part in parts], torch.arange(parts[0].shape[-1])
        planes = [unpacked(part.float()) for part in parts]
        height, width = planes[0].shape[-2:]
        radius = torch.hypot(torch.arange(height)[:, None] / height, torch.arange(width) / width)
        place = torch.bucketize(radius, torch.tensor(self.edges))
        return [dct(height) @ plane @ dct(width).T for plane in planes], place

    def _join(self, mixed: Tensor, like: Tensor) -> Tensor:
        if self.groups == "channel":
            return mixed
        plane = dct(mixed.shape[-2]).T @ mixed @ dct(mixed.shape[-1])
        return packed(plane).reshape(like.shape)


def dct(size: int) -> Tensor:
    """The orthonormal DCT-II, [size, size]."""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(pi * (k + 0.5) * k[:, None] / size) * sqrt(2 / size)
    matrix[0] /= sqrt(2)
    return matrix.float()


def unpacked(tokens: Tensor) -> Tensor:
    """FLUX's tokens [..., side^2, 4 C], 2x2 patches, as planes [..., C, 2 side, 2 side]."""
    side = round(sqrt(tokens.shape[-2]))
    patches = tokens.unflatten(-1, (-1, 2, 2)).unflatten(-4, (side, side))  # [.., s, s, C, 2, 2]
    return patches.movedim((-3, -5, -2, -4, -1), (-5, -4, -3, -2, -1)).flatten(-2).flatten(-3, -2)


def packed(planes: Tensor) -> Tensor:
    """The inverse of `unpacked`."""
    side = planes.shape[-1] // 2
    patches = planes.unflatten(-1, (side, 2)).unflatten(-3, (side, 2))  # [.., C, s, 2, s, 2]
    return patches.movedim((-4, -2, -5, -3, -1), (-5, -4, -3, -2, -1)).flatten(-3).flatten(-3, -2)
