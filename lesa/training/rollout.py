"""One accelerated run beside the base run: what it is told, where it stands, what it finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.forecasters.guard import relative_change
from lesa.forecasters.taylor import lagrange
from lesa.training.row_fit import Tail, applied, fit_parts, fit_row, fit_row_behind, guided

Tails = Callable[[Sequence[int] | None], Tail]  # for some pictures; None for all

EARLY = 0.85  # noise level above which a row is shrunk towards a straight line


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


@dataclass(frozen=True)
class RolloutSpec:
    """What a rollout is told.

    Attributes:
        schedule: which steps are full.
        history: K, the number of cached features.
        uses_latent: whether the current latent is one more regressor.
        drift: beta of the target v* = v_base - beta pull (x - x_base), which also steers the latent
            back to the base path.
        ridge: ties the fit to the prior coefficients, relative to the mean energy of the
            regressors; behind a tail `lesa.training.row_fit.DAMPINGS` tie each round to the one
            before.
        shrinkage: of early rows this share is the straight line through the two newest features,
            which knows no prompt. At high noise the picture is decided on, and what most
            calibration prompts do there is wrong for the odd one.
        frozen: the coefficients are run as they are, without a fit.
        rows: coefficients to run, branch -> ``[steps, K + uses_latent (, parts)]``; None where the
            run begins with a prior.
        shared: with them, the rows for all parts.
    """

    schedule: Schedule
    history: int
    uses_latent: bool = True
    drift: float = 0.5
    ridge: float = 1e-5
    shrinkage: float = 0.0
    frozen: bool = False
    rows: Mapping[str, Tensor] | None = None
    shared: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class RolloutState:
    """Where a rollout stands in its run.

    Attributes:
        rings: branch -> features of the last full steps, newest first.
        carried_residual: a step, and what its earlier branches could not fit of the guided sum.
    """

    rings: dict[str, list[Tensor]] = field(default_factory=dict)
    carried_residual: tuple[int, Tensor] | None = None


@dataclass
class RolloutResult:
    """What a run finds; all of it lies on the host in float64.

    Attributes:
        coefficients: branch -> ``[steps, K + uses_latent]``, with a third dimension for parts.
        shared: branch -> the rows for all parts, where parts have separate ones.
        change: of each picture, from the first full step to the second, what a guard would read of
            it (`lesa.forecasters.guard.relative_change`).
        error: of the final latents, ``[pictures, elements]``, relative to the base run's RMS; None
            where the rollout has not run to the end.
    """

    coefficients: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    change: Tensor | None = None
    error: Tensor | None = None

    def stored(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """By branch the coefficients as a calibration keeps them: the rows for all parts, and the
        separate ones, if parts have any."""
        return {
            branch: (self.shared[branch], rows) if branch in self.shared else (rows, None)
            for branch, rows in self.coefficients.items()
        }

    @property
    def score(self) -> Tensor | None:
        """dB per picture: the base latent's mean square over the error's; higher is better."""
        return (
            None if self.error is None else -10 * torch.log10(self.error.square().mean(1) + 1e-12)
        )


@dataclass
class Rollout:
    """One accelerated run beside the base run.

    The rows of a picture in one call share their coefficients, so the fit sees their sum with
    guidance weights, which is what the sampler gets. Where a run can tell its guidance parts apart
    each has separate coefficients, fitted together to that sum and tied to the row for all, which
    is kept as ``shared`` for runs that cannot. Branches that are called one after the other have
    separate coefficients; what the first could not fit is added to the target of the next, so that
    it cancels in the guided sum.

    Features, latents and outputs lie where the denoiser is, in its dtype, and their weighted sums
    are float32 there; what is solved or judged lies on the host in float64.
    """

    spec: RolloutSpec
    state: RolloutState = field(default_factory=RolloutState)
    result: RolloutResult = field(default_factory=RolloutResult)

    def begin(self) -> None:
        """Forget an earlier run's states and results."""
        rows, shared = self.spec.rows or {}, dict(self.spec.shared)
        self.state = RolloutState()
        self.result = RolloutResult({branch: row.clone() for branch, row in rows.items()}, shared)

    def start(self, branch: str, prior: Tensor, parts: int) -> None:
        """Rows ``[steps, K + uses_latent]`` to begin with, for so many parts."""
        self.result.coefficients[branch] = prior
        if parts > 1:
            self.result.shared[branch] = prior
            self.result.coefficients[branch] = prior[..., None].repeat(1, 1, parts)

    def push(self, branch: str, feature: Tensor) -> None:
        """Keep the feature ``[rows, pictures, ...]`` of a full step, newest first."""
        ring = self.state.rings.setdefault(branch, [])
        if ring and self.result.change is None:  # at the second full step
            parts = zip(feature, ring[0], strict=True)
            self.result.change = torch.stack([relative_change(*part) for part in parts]).amax(0)
        ring.insert(0, feature)
        del ring[self.spec.history :]

    def follow(self, other: Rollout, at: Visit) -> None:
        """Take over what another rollout of the same states so far has found for a step."""
        if self.spec.schedule.is_full(at.step):
            return  # no rows there, and the two may differ in their width
        for mine, theirs in (
            (self.result.coefficients, other.result.coefficients),
            (self.result.shared, other.result.shared),
        ):
            if at.branch in mine:
                mine[at.branch][at.step] = theirs[at.branch][at.step]
        self.state.carried_residual = other.state.carried_residual

    def forecast(
        self,
        at: Visit,
        latent: Tensor,
        base: tuple[Tensor, Tensor] | None,
        tails: Tails | None = None,
        fitted: Sequence[int] | None = None,
    ) -> Tensor:
        """Fit the row of a skipped step on the states at hand, store it, and apply it.

        All tensors are ``[rows, pictures, ...]``: the current latent, the base run's latent (of one
        row, without that dimension) and output, None where nothing is fitted, and the forecast
        output. ``tails`` makes what leads from a forecast feature of some pictures to their
        outputs; None where the output itself is forecast. ``fitted`` are the pictures that the row
        is fitted to; None for all.
        """
        ring, rows = self.state.rings[at.branch], self.result.coefficients[at.branch]
        regressors = [*ring, latent] if self.spec.uses_latent else ring
        columns = [*range(len(ring)), *([rows.shape[1] - 1] if self.spec.uses_latent else [])]
        if not self.spec.frozen:
            assert base is not None  # what is fitted has something to be fitted to
            target = self._target(at, guided(base[1], at.shares), latent[0] - base[0])
            some = slice(None) if fitted is None else [*fitted]
            tail = None if tails is None else tails(fitted)
            wanted = target[:, some] if at.shares is None else target[some]
            self._fit(at, wanted, [part[:, some] for part in regressors], columns, tail)
        output = applied(rows[at.step, columns], regressors).to(ring[0].dtype)
        output = output if tails is None else tails(None)(output)
        if at.rate and not self.spec.frozen:
            residual = at.rate * (target - guided(output, at.shares))
            self.state.carried_residual = at.step, residual
        return output

    def fixed(self) -> Rollout:
        """This rollout's coefficients, to be run as they are."""
        rows = {branch: row.clone() for branch, row in self.result.coefficients.items()}
        shared = dict(self.result.shared)
        return Rollout(replace(self.spec, frozen=True, rows=rows, shared=shared))

    def _fit(
        self,
        at: Visit,
        target: Tensor,
        regressors: list[Tensor],
        columns: list[int],
        tail: Tail | None,
    ) -> None:
        """Store the row of a step, and one for each part where they are told apart."""
        rows = self.result.coefficients[at.branch]
        shared = self.result.shared.get(at.branch, rows)
        prior = shared[at.step, columns]
        if tail is None:
            fitted = fit_row(regressors, target, prior, at.shares, self.spec.ridge)
        else:
            fitted = fit_row_behind(tail, regressors, target, prior, at.shares)
        if rows.ndim == 3:
            assert at.shares is not None  # parts are told apart where their weights are known
            ring = regressors[:-1] if self.spec.uses_latent else regressors
            latent = regressors[-1] if self.spec.uses_latent else None
            parts = fit_parts(ring, latent, target, fitted, at.shares)
            rows[at.step] = 0
            rows[at.step, columns] = self._shrunk(at, parts)
        shared[at.step] = 0
        shared[at.step, columns] = self._shrunk(at, fitted)

    def _shrunk(self, at: Visit, fitted: Tensor) -> Tensor:
        """A row ``[columns]``, or one for each part ``[columns, parts]``, as it is run."""
        if at.sigma <= EARLY:
            return fitted
        line = self._line(at.step, len(fitted)).view(-1, *[1] * (fitted.ndim - 1))
        return fitted + self.spec.shrinkage * (line - fitted)

    def _line(self, step: int, columns: int) -> Tensor:
        """The row of a line through two features, followed no farther than they are apart."""
        cached = self.spec.schedule.cached_before(step, min(2, self.spec.history))
        farthest = 2 * cached[0] - cached[-1]
        weights = lagrange(min(step, farthest), cached)
        return torch.tensor(weights + [0.0] * (columns - len(weights)), dtype=torch.float64)

    def _target(self, at: Visit, truth: Tensor, error: Tensor) -> Tensor:
        """v_base, what steers an error of the latent back, and the residual that an earlier branch
        of this step left."""
        target, carried = truth, self.state.carried_residual
        if at.pull:
            target = target - at.pull * self.spec.drift * error.float()
        if carried is not None and carried[0] == at.step:
            target = target + carried[1] / at.rate
        return target
