"""The sampler as the base runs show it: how the next latent follows from latent and outputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TRUSTED = 0.5  # relative RMS misfit up to which an error of the latent may be steered back


class Sampler(NamedTuple):
    """x_{s+1} = keep[s] x_s + sum_j rates[s, j] v_{s,j}, with x as the denoiser is given it.

    ``j`` runs over the rows that the denoiser computes for one picture: its guidance branches and,
    with batched guidance, the parts of each. Exact for first-order deterministic samplers and
    plain guidance, whatever is predicted and however the input is scaled: ``keep`` [T] and
    ``rates`` [T, J] hold the scheduler's step and the guidance weights. ``misfit`` is the RMS of
    what is left over, relative to what the outputs add, over all steps: noise of an ancestral
    sampler, earlier outputs in a multistep one, rescaled guidance, rounding.
    """

    keep: Tensor
    rates: Tensor
    misfit: float

    @property
    def trusted(self) -> bool:
        """Whether it explains the steps well enough to steer by it."""
        return self.misfit <= TRUSTED

    def influence(self) -> Tensor:
        """d x_T / d v_{s,j} with the later outputs held fixed, ``[T, J]``."""
        later = self.keep.flip(0).cumprod(0).flip(0)  # product of keep over s..T-1
        return self.rates * torch.cat([later[1:], later.new_ones(1)])[:, None]


def identify(gram: Tensor, num_steps: int, rows: int) -> Sampler:
    """Least squares for ``keep`` and ``rates`` from inner products.

    ``gram`` is over the basis (v_{0..T-1, 0}, v_{0..T-1, 1}, ..., x_0 .. x_T, 1). Where rows are
    equal to rounding (guidance that has no effect) they get equal shares.
    """
    keep, rates = gram.new_zeros(num_steps), gram.new_zeros(num_steps, rows)
    left = moved = 0.0
    for step in range(num_steps):
        now = rows * num_steps + step
        indices = [now, *(row * num_steps + step for row in range(rows))]
        moments, onto = gram[indices][:, indices], gram[indices, now + 1]
        solution = torch.linalg.pinv(moments, rtol=1e-12, hermitian=True) @ onto
        keep[step], rates[step] = solution[0], solution[1:]
        total = gram[now + 1, now + 1] - 2 * solution @ onto + solution @ moments @ solution
        left += float(total)
        moved += float(rates[step] @ moments[1:, 1:] @ rates[step])
    return Sampler(keep, rates, (max(left, 0.0) / max(moved, 1e-30)) ** 0.5)
