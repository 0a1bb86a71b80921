"""Least-squares fits of one row of coefficients, on the states of one skipped step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lesa.util.numerics import float64

GAUSS_NEWTON = 2  # rounds of linearising the tail
DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2)  # of a round, relative to the slopes' mean energy
# Of a part's row to the row for all parts, relative to the regressors' mean energy: looser ones are
# 0.6 dB better at the guidance scale of the fit and lose 5 dB at other ones.
TIE = 1e-2
MOVE = 0.05  # of a coefficient, for its derivative: features cancel below, the tail bends above

Tail = Callable[[Tensor], Tensor]  # feature [rows, pictures, ...] -> output


def fit_row(
    regressors: list[Tensor], target: Tensor, prior: Tensor, shares: Tensor | None, ridge: float
) -> Tensor:
    """The row ``[columns]`` whose guided sum comes nearest to the target ``[pictures, ...]``.

    Args:
        regressors: one tensor ``[rows, pictures, ...]`` per column.
        target: the guided output that is wanted.
        prior: the row that the fit is tied to.
        shares: guidance weights of the rows, None where unknown.
        ridge: how closely it is tied, relative to the mean energy of the regressors.
    """
    return ridge_fit([guided(part, shares) for part in regressors], target, prior, ridge)


def fit_row_behind(
    tail: Tail, regressors: list[Tensor], target: Tensor, prior: Tensor, shares: Tensor | None
) -> Tensor:
    """The row ``[columns]`` whose output behind a tail comes nearest to the target.

    Only what the tail lets through matters: Gauss-Newton on its outputs, with differences of the
    row's entries as derivatives. Of several dampings the one counts whose true output is nearest:
    a norm hides the scale of a feature, so that an undamped step may end anywhere.
    """

    def output(moved: Tensor) -> Tensor:
        feature = mixed(moved.tolist(), regressors).to(regressors[0].dtype)
        return guided(tail(feature), shares)

    row, here = prior, output(prior)
    moves = MOVE * torch.eye(len(row), dtype=row.dtype)
    for _ in range(GAUSS_NEWTON):
        slopes = [(output(row + move) - here) / MOVE for move in moves]
        rest = target - here + mixed(row.tolist(), slopes)
        near = [ridge_fit(slopes, rest, row, damping) for damping in DAMPINGS]
        reached = [(row, here), *((moved, output(moved)) for moved in near)]
        row, here = min(reached, key=lambda pair: float((pair[1] - target).square().sum()))
    return row


def fit_parts(
    ring: list[Tensor], latent: Tensor | None, target: Tensor, fitted: Tensor, shares: Tensor
) -> Tensor:
    """Rows ``[columns, parts]`` whose outputs' guided sum comes nearest to the target.

    They are tied to ``fitted``, the row for all parts. The latent, where it is a regressor, is the
    same in all parts, and so is its coefficient.
    """
    weights, held = shares.tolist(), len(ring)
    parts = [weight * feature[p].float() for p, weight in enumerate(weights) for feature in ring]
    own = [] if latent is None else [guided(latent, shares)]
    start = torch.cat([fitted[:held].repeat(len(weights)), fitted[held:]])
    found = ridge_fit([*parts, *own], target, start, TIE)
    features = found[: held * len(weights)].reshape(len(weights), held).T
    return torch.cat([features, found[held * len(weights) :, None].expand(-1, len(weights))])


def ridge_fit(regressors: list[Tensor], target: Tensor, start: Tensor, ridge: float) -> Tensor:
    """argmin_c |sum_k c_k r_k - target|^2 + p |c - start|^2, p = ridge x mean_k |r_k|^2.

    Inner products are taken in float64 where the tensors are, or on the host where their device
    has no float64; ``start`` and the result ``[K]`` are on the host.
    """
    matrix = torch.stack([float64(part).flatten() for part in (*regressors, target)])
    products = (matrix[:-1] @ matrix.T).cpu()
    moments, onto = products[:, :-1], products[:, -1]
    pull = ridge * moments.diagonal().mean() * torch.eye(len(start), dtype=torch.float64)
    return start + torch.linalg.solve(moments + pull, onto - moments @ start)


def guided(part: Tensor, shares: Tensor | None) -> Tensor:
    """Sum over the rows with their guidance weights, ``[pictures, ...]``; as it is without."""
    return part.float() if shares is None else mixed(shares.tolist(), list(part))


def mixed(weights: list[float], parts: list[Tensor]) -> Tensor:
    """sum_k weights[k] parts[k] in float32."""
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for weight, part in zip(weights, parts, strict=True):
        total += weight * part.float()
    return total


def applied(row: Tensor, regressors: list[Tensor]) -> Tensor:
    """A row ``[columns]``, or one for each part ``[columns, parts]``, on ``[parts, ...]``."""
    if row.ndim == 1:
        return mixed(row.tolist(), regressors)
    parts = enumerate(row.T.tolist())
    return torch.stack([mixed(weights, [r[p] for r in regressors]) for p, weights in parts])
