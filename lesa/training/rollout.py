"""One accelerated run beside the base run: its ring, and the fit of a skipped step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.forecasters.taylor import lagrange
from lesa.training.search import balanced
from lesa.util.numerics import float64

EARLY = 0.85  # noise level above which a row is shrunk towards a straight line
GAUSS_NEWTON = 2  # rounds of linearising the tail
DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2)  # of a round, relative to the slopes' mean energy
# Of a part's row to the row for all parts, relative to the regressors' mean energy: looser ones are
# 0.6 dB better at the guidance scale of the fit and lose 5 dB at other ones.
TIE = 1e-2
MOVE = 0.05  # of a coefficient, for its derivative: features cancel below, the tail bends above

Tail = Callable[[Tensor], Tensor]  # feature [rows, pictures, ...] -> output


class Visit(NamedTuple):
    """Where a rollout is asked for a forecast.

    ``shares`` are the guidance weights of the branch's rows, None where unknown. ``rate`` is the
    branch's d x_{s+1} / d v_s, ``pull`` the correction of v_s in every branch that takes one unit
    of error out of x_{s+1}; both are 0 where the sampler is unknown. ``sigma`` is the noise level.
    """

    step: int
    branch: str
    shares: Tensor | None = None
    rate: float = 0.0
    pull: float = 0.0
    sigma: float = 0.0


@dataclass
class Rollout:
    """One accelerated run beside the base run.

    ``drift`` is beta of the target v* = v_base - beta pull (x - x_base), which also steers the
    latent back to the base path. ``ridge`` ties the fit to the prior coefficients, relative to the
    mean energy of the regressors; behind a tail `DAMPINGS` tie each round to the one
    before. With ``frozen`` the prior is run as it is, without a fit.

    At high noise the picture is decided on, and what most calibration prompts do there is wrong for
    the odd one: of early rows a share, ``shrinkage``, is the straight line through the two newest
    features, which knows no prompt.

    The rows of a picture in one call share their coefficients, so the fit sees their sum with
    guidance weights, which is what the sampler gets. Where a run can tell its guidance parts apart
    each has separate coefficients, fitted together to that sum and tied to the row for all, which
    is kept in ``shared`` for runs that cannot. Branches that are called one after the other have
    separate coefficients; what the first could not fit is added to the target of the next, so that
    it cancels in the guided sum.

    Until the step that it ``leaves`` at, a rollout has the states of the first rollout of its run,
    and costs nothing.

    A run fills ``coefficients`` (branch -> ``[steps, K + uses_latent]``, with a third dimension for
    parts), ``error`` (of the final latents, ``[pictures, elements]``, relative to the base run's
    RMS) and ``score`` (dB per picture).

    Features, latents and outputs lie where the denoiser is, in its dtype, and their weighted sums
    are float32 there; what is solved or judged (coefficients, errors, scores) lies on the host in
    float64.
    """

    schedule: Schedule
    history: int
    uses_latent: bool = True
    drift: float = 0.5
    ridge: float = 1e-5
    shrinkage: float = 0.0
    frozen: bool = False
    leaves: int = 0
    coefficients: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    error: Tensor | None = None
    score: Tensor | None = None
    rings: dict[str, list[Tensor]] = field(default_factory=dict)
    carried_residual: tuple[int, Tensor] | None = None

    def begin(self) -> None:
        """Forget an earlier run's states and results."""
        self.rings, self.coefficients, self.shared, self.carried_residual = {}, {}, {}, None

    def start(self, branch: str, prior: Tensor, parts: int) -> None:
        """Rows ``[steps, K + uses_latent]`` to begin with, for so many parts."""
        self.coefficients[branch] = prior
        if parts > 1:
            self.shared[branch] = prior
            self.coefficients[branch] = prior[..., None].repeat(1, 1, parts)

    def push(self, branch: str, feature: Tensor) -> None:
        """Keep the feature ``[rows, pictures, ...]`` of a full step, newest first."""
        ring = self.rings.setdefault(branch, [])
        ring.insert(0, feature.clone())
        del ring[self.history :]

    def forecast(
        self,
        at: Visit,
        latent: Tensor,
        base_latent: Tensor,
        base: Tensor,
        tail: Tail | None = None,
    ) -> Tensor:
        """Fit the row of a skipped step on the states at hand, store it, and apply it.

        All tensors are ``[rows, pictures, ...]``: the current latent and the base run's, the base
        run's output, and the forecast output. ``tail`` leads from a forecast feature to an output;
        None where the output itself is forecast.
        """
        ring, rows = self.rings[at.branch], self.coefficients[at.branch]
        regressors = [*ring, latent] if self.uses_latent else ring
        columns = [*range(len(ring)), *([rows.shape[1] - 1] if self.uses_latent else [])]
        if not self.frozen:
            target = self._target(at, guided(base, at.shares), latent, base_latent)
            shared = self.shared.get(at.branch, rows)
            fitted = self._fit(at, target, regressors, shared[at.step, columns], tail)
            if rows.ndim == 3:
                parts = self._fit_parts(at, target, ring, latent, fitted)
                rows[at.step] = 0
                rows[at.step, columns] = self._shrunk(at, parts)
            shared[at.step] = 0
            shared[at.step, columns] = self._shrunk(at, fitted)
        output = applied(rows[at.step, columns], regressors).to(ring[0].dtype)
        output = output if tail is None else tail(output)
        if at.rate and not self.frozen:
            self.carried_residual = at.step, at.rate * (target - guided(output, at.shares))
        return output

    def _fit_parts(
        self, at: Visit, target: Tensor, ring: list[Tensor], latent: Tensor, fitted: Tensor
    ) -> Tensor:
        """Rows ``[columns, parts]`` whose outputs' guided sum comes nearest to the target.

        The latent is the same in all parts, and so is its coefficient.
        """
        assert at.shares is not None
        shares, held = at.shares.tolist(), len(ring)
        parts = [share * feature[p].float() for p, share in enumerate(shares) for feature in ring]
        own = [guided(latent, at.shares)] if self.uses_latent else []
        start = torch.cat([fitted[:held].repeat(len(shares)), fitted[held:]])
        found = ridge_fit([*parts, *own], target, start, TIE)
        features = found[: held * len(shares)].reshape(len(shares), held).T
        return torch.cat([features, found[held * len(shares) :, None].expand(-1, len(shares))])

    def _fit(
        self, at: Visit, target: Tensor, regressors: list[Tensor], prior: Tensor, tail: Tail | None
    ) -> Tensor:
        """The row whose output comes nearest to the target.

        Behind a ``tail`` only what it lets through matters: Gauss-Newton on its outputs, with
        differences of the row's entries as derivatives. Of several dampings the one counts whose
        true output is nearest: a norm hides the scale of a feature, so that an undamped step may
        end anywhere.
        """
        if tail is None:
            return ridge_fit([guided(p, at.shares) for p in regressors], target, prior, self.ridge)

        def output(moved: Tensor) -> Tensor:
            feature = mixed(moved.tolist(), regressors).to(regressors[0].dtype)
            return guided(tail(feature), at.shares)

        row, here = prior, output(prior)
        moves = MOVE * torch.eye(len(row), dtype=row.dtype)
        for _ in range(GAUSS_NEWTON):
            slopes = [(output(row + move) - here) / MOVE for move in moves]
            rest = target - here + mixed(row.tolist(), slopes)
            near = [ridge_fit(slopes, rest, row, damping) for damping in DAMPINGS]
            reached = [(row, here), *((moved, output(moved)) for moved in near)]
            row, here = min(reached, key=lambda pair: float((pair[1] - target).square().sum()))
        return row

    def _shrunk(self, at: Visit, fitted: Tensor) -> Tensor:
        """A row ``[columns]``, or one for each part ``[columns, parts]``, as it is run."""
        if at.sigma <= EARLY:
            return fitted
        line = self._line(at.step, len(fitted)).view(-1, *[1] * (fitted.ndim - 1))
        return fitted + self.shrinkage * (line - fitted)

    def _line(self, step: int, columns: int) -> Tensor:
        """The row of a line through two features, followed no farther than they are apart."""
        cached = self.schedule.cached_before(step, min(2, self.history))
        farthest = 2 * cached[0] - cached[-1]
        weights = lagrange(min(step, farthest), cached)
        return torch.tensor(weights + [0.0] * (columns - len(weights)), dtype=torch.float64)

    def _target(self, at: Visit, truth: Tensor, latent: Tensor, base_latent: Tensor) -> Tensor:
        """v_base, what steers back, and what an earlier branch of this step still owes."""
        target = truth
        if at.pull:
            target = target - at.pull * self.drift * (latent[0] - base_latent[0]).float()
        if self.carried_residual is not None and self.carried_residual[0] == at.step:
            target = target + self.carried_residual[1] / at.rate
        return target


@dataclass
class FixedRollout(Rollout):
    """A rollout whose ``rows`` are given, and what is ``shared``, whatever run it is in."""

    frozen: bool = True
    rows: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, rollout: Rollout) -> FixedRollout:
        """A fitted rollout's rows."""
        rows = {branch: rows.clone() for branch, rows in rollout.coefficients.items()}
        made = cls(rollout.schedule, rollout.history, rollout.uses_latent, rollout.drift, rows=rows)
        made.shrinkage, made.shared = rollout.shrinkage, rollout.shared
        return made

    def begin(self) -> None:
        shared = self.shared
        super().begin()
        self.coefficients = {branch: rows.clone() for branch, rows in self.rows.items()}
        self.shared = shared


def quality(rollout: Rollout) -> float:
    """Mean and 10th percentile of a rollout's scores, equally weighted, in dB."""
    assert rollout.score is not None
    return balanced(rollout.score)


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
