"""Rows for a run that no calibration matches: carried over where a gap is alike, else damped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, inf
from typing import NamedTuple

import torch
from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.forecasters.calibration import Calibration
from lesa.forecasters.moments import interpolation
from lesa.forecasters.prior import FITTED, Prior, times, widest_gaps

REACH = 0.15  # distance of gaps, in their widths, at which fitted rows count 1 / e
NOISE = 30.0  # energy of a cached feature's error over that of the forecasts before it
COARSE = 1.5  # more fiftieths of the trained run in one step, at which forecasts count 1 / e
WIDTH = 0.12  # share of a run up to which the prior's line is better than these rows,
SHARP = 8  # and how sharply it ends there
OVER = 0.55  # excess of the guidance scale over the trained one at which rows count 1 / e
FLOOR = 1e-5  # the least relative error of a regressor


class Rows(NamedTuple):
    """Coefficients [S, K + uses_latent], and for P guidance parts [S, K + uses_latent, P]."""

    shared: Tensor
    split: Tensor | None = None


class Line(NamedTuple):
    """Rows [S, K + latent] and how much each of them counts, [S]."""

    rows: Tensor
    shares: Tensor


@dataclass(frozen=True)
class _Gap:
    """The skipped steps between two full ones: what their coefficients depend on.

    held: noise levels of the cached features, newest first. end: that of the next full step, or of
    the run's end. places: where its skipped steps lie, from 0 at held[0] to 1 at the end.
    """

    first: int
    held: tuple[float, ...]
    end: float
    places: tuple[float, ...]

    @property
    def steps(self) -> slice:
        return slice(self.first, self.first + len(self.places))

    def distance(self, other: _Gap) -> float:
        """How far apart two gaps are: the larger of the difference of their noise levels, in widths
        of the narrower one, and of the shares that the full step itself covers."""
        if len(self.held) != len(other.held):
            return inf
        pairs = zip((*self.held, self.end), (*other.held, other.end), strict=True)
        width = min(self.held[0] - self.end, other.held[0] - other.end)
        apart = max(abs(a - b) for a, b in pairs) / width
        return max(apart, abs(self.places[0] - other.places[0]))


def gaps(schedule: Schedule, levels: Sequence[float], history: int) -> Iterator[_Gap]:
    """The gaps of a run in which steps are skipped."""
    for full, after in pairwise((*schedule.full_steps, schedule.steps)):
        if after - full > 1:
            held = [levels[s] for s in schedule.cached_before(full + 1, history)]
            width = levels[full] - levels[after]
            places = [(levels[full] - level) / width for level in levels[full + 1 : after]]
            yield _Gap(full + 1, tuple(held), levels[after], tuple(places))


def carried(
    base: Tensor,
    calibrations: Iterable[Calibration],
    schedule: Schedule,
    levels: Sequence[float],
    branch: str,
    history: int,
) -> Rows:
    """In each gap w times the rows of the most similar calibrated one, and 1 - w times `base`.

    w = exp(-(d / REACH)^2), d the distance of the gaps; rows are taken at the same place of the gap
    (straight lines between them). What closes a loop over own errors is in the fitted rows, and
    does not follow from any statistics of plain runs.
    """
    known = [
        (gap, entry)
        for entry in calibrations
        if branch in entry.rows
        for gap in gaps(entry.schedule, entry.sigmas, history)
    ]
    shared, split = base.clone(), None
    for gap in gaps(schedule, levels, history):
        apart, near, entry = min(
            ((gap.distance(other), other, entry) for other, entry in known),
            key=lambda found: found[0],
            default=(inf, gap, None),
        )
        share = exp(-((apart / REACH) ** 2))
        if entry is None or share < 1e-3:
            continue
        along = interpolation([-place for place in near.places], [-place for place in gap.places])
        fitted = along @ entry.rows[branch][near.steps]
        shared[gap.steps] += share * (fitted - base[gap.steps])
        parts = entry.split.get(branch)
        if parts is not None and (split is None or split.shape[2] == parts.shape[2]):
            split = base[..., None].repeat(1, 1, parts.shape[2]) if split is None else split
            found = torch.einsum("ts,sfp->tfp", along, parts[near.steps])
            split[gap.steps] += share * (found - base[gap.steps][..., None])
    return Rows(shared, split)


def reuse(schedule: Schedule, width: int) -> Tensor:
    """Weight 1 on the newest feature at every skipped step: float64 [S, width]."""
    rows = torch.zeros(schedule.steps, width, dtype=torch.float64, device="cpu")
    rows[list(schedule.skipped_steps), 0] = 1
    return rows


def overguided(rows: Rows, schedule: Schedule, ratio: float) -> Rows:
    """Rows for a guidance scale that is `ratio` > 1 times that of the training: in every entry

        e + exp(-(ratio - 1) / OVER) (c - e),   e = reuse

    More guidance bends the path more, and a row that reaches too far is worse than reuse. OVER was
    chosen on embedded flux, sdxl and qwen: of shares from 0 to 1 in fifths the best ones for the
    mean squared error were 0.6 to 0.8 at 1.15 to 1.25 times the trained scale, 0.4 to 0.6 at 1.3
    to 1.6, 0.2 to 0.4 at 1.7 to 2.2. Below the trained scale fitted rows are not worse than at it.
    """
    base, share = reuse(schedule, rows.shared.shape[1]), exp(-(ratio - 1) / OVER)
    shared = base + share * (rows.shared - base)
    split = None if rows.split is None else base[..., None] + share * (rows.split - base[..., None])
    return Rows(shared, split)


def damped(
    schedule: Schedule,
    gram: Tensor,
    history: int,
    latent: bool,
    trained_at: Sequence[float] | None = None,
    line: Line | None = None,
) -> Tensor:
    """Least squares on plain runs' inner products, damped towards reuse: float64 [S, K + latent].

        c_s = e + u (G + N)^-1 (g_s - G e),   e = reuse, N = diag(noise_k G_kk)

    G are the inner products of the regressors of step s (K cached features and perhaps the latent),
    g_s those with v_s. An accelerated run finds its features with errors, which differences of them
    magnify at every full step; plain runs know nothing of it, and least squares on them alone falls
    ten dB below reuse where gaps are wide. So a feature of a full step counts as known up to

        noise = NOISE r rho^2 (m - 1) / m

    after a gap of m steps, whose forecasts have the mean relative squared error r; rho is the share
    of reuse's error that least squares without damping leaves. Wide gaps, which nobody can
    forecast, become reuse by themselves. The latent has the largest noise of a row.

    A run of long steps takes another path, of which statistics say little: where one of its steps
    is n fiftieths of the trained run, u = exp(-((n - 1) / COARSE)^2), else 1. `trained_at` are the
    places of the S + 1 noise levels in the trained run, in its fiftieths.

    Where gaps are narrow these rows are too careful: there `line` takes their place before u pulls
    (`prior_line`).

    NOISE and COARSE were chosen on lists of 4 to 13 full steps of 9 to 100, on calibration prompts
    of embedded flux and sdxl, so that no list was below reuse. `gram` is [S, S], or [2 S, 2 S] with
    the latents behind.
    """
    rows, noise = reuse(schedule, history + latent), {0: 0.0}
    base = rows.clone()
    for full, after in pairwise((*schedule.full_steps, schedule.steps)):
        errors = []
        for step in range(full + 1, after):
            cached = schedule.cached_before(step, history)
            at = [*cached, *([schedule.steps + step] if latent else [])]
            columns = [*range(len(cached)), *([history] if latent else [])]
            row, found = _solved(gram, at, step, [noise[s] for s in cached])
            rows[step, columns] = row
            errors.append(found)
        noise[after], gap = _noise(errors), slice(full + 1, after)
        if line is not None:
            rows[gap] += line.shares[gap, None] * (line.rows[gap] - rows[gap])
        if trained_at is not None:
            longer = max((trained_at[after] - trained_at[full]) / (after - full) - 1, 0.0)
            rows[gap] = base[gap] + exp(-((longer / COARSE) ** 2)) * (rows[gap] - base[gap])
    return rows


def prior_line(schedule: Schedule, levels: Sequence[float], width: int) -> Line:
    """The line that an untrained run takes (`lesa.forecasters.prior`), in rows of this width.

    It counts by 1 / (1 + (g / WIDTH)^SHARP), g the wider of the gap that a step lies in and the one
    before it, and nothing where one feature is cached. A sampler that extrapolates over its steps
    has no use for it.
    """
    made = Prior().table(schedule, levels).coefficients
    rows = torch.zeros(schedule.steps, width, dtype=torch.float64, device="cpu")
    rows[:, : min(made.shape[1], width)] = made[:, :width]
    shares = torch.zeros(schedule.steps, dtype=torch.float64, device="cpu")
    at = times(schedule.steps, levels, FITTED.shift)
    for step, gap in widest_gaps(schedule, at).items():
        if len(schedule.cached_before(step, 2)) == 2:
            shares[step] = 1 / (1 + (gap / WIDTH) ** SHARP)
    return Line(rows, shares)


def _solved(
    gram: Tensor, at: Sequence[int], step: int, doubts: Sequence[float]
) -> tuple[Tensor, list[float]]:
    """The row of a step on the regressors `at`, and the errors that `_noise` asks for; a latent
    behind the features, which have these doubts, has the largest of them."""
    system, none = _System(gram, at, step), [0.0] * len(at)
    row = system.solve([*doubts, *[max(doubts)] * (len(at) - len(doubts))])
    return row, [system.error(x) for x in (row, system.solve(none), None)]


class _System:
    """The least squares of one step: regressors `at` of a Gram matrix, the first of them reused."""

    def __init__(self, gram: Tensor, at: Sequence[int], step: int) -> None:
        self._moments, self._onto = gram[at][:, at], gram[at, step]
        self._energy = float(gram[step, step])
        self._start = torch.zeros(len(at), dtype=torch.float64, device="cpu")
        self._start[0] = 1

    def solve(self, doubts: Sequence[float]) -> Tensor:
        """The row, with regressors known up to errors of these relative energies."""
        errors = torch.tensor(doubts, dtype=torch.float64, device="cpu") + FLOOR
        pulled = self._moments + torch.diag(errors * self._moments.diagonal())
        return self._start + torch.linalg.solve(pulled, self._onto - self._moments @ self._start)

    def error(self, row: Tensor | None) -> float:
        """Relative squared error of a row's forecasts of plain runs; None is reuse."""
        row = self._start if row is None else row
        energy = row @ self._moments @ row - 2 * row @ self._onto + self._energy
        return max(float(energy), 0.0) / self._energy


def _noise(errors: Sequence[Sequence[float]]) -> float:
    """`damped`'s noise after a gap, from each step's errors: of its row, undamped, of reuse."""
    if not errors:
        return 0.0
    own, undamped, reused = (sum(column) / len(errors) for column in zip(*errors, strict=True))
    left = undamped / reused if reused > 0 else 1.0
    return NOISE * own * left**2 * len(errors) / (len(errors) + 1)
