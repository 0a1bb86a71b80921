"""Phase 3: fit coefficients in lock-step with the base run, on the states that the accelerated
run really visits.

One call of the plain pipeline carries several copies of the calibration prompts in its batch: the
base run and one *lane* per step list. At a step that a lane skips, its rows of the denoiser's
output are replaced by the forecast that has just been fitted, so the sampler, the guidance and
everything else of the pipeline act on all lanes alike. A lane's full steps and the base rows are
the only ones that are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lesa.hooks import Denoiser, attach, detach, make_output, read_sample
from lesa.schedule import Schedule
from lesa.training.job import Job, followed

Prior = Callable[[Schedule, tuple[float, ...], str], Tensor]  # -> [steps, K + uses_latent]


@dataclass
class Lane:
    """One accelerated run beside the base run.

    ``drift`` is beta of the target v* = v_base + beta (x_base - x) / dsigma, which also pulls the
    latent back to the base path. ``ridge`` ties the fit to the prior coefficients, relative to the
    mean energy of the regressors. With ``frozen`` the prior is run as it is, without a fit.

    A run fills ``coefficients`` (branch -> ``[steps, K + uses_latent]``), ``residual`` (branch ->
    relative squared error of each skipped step) and ``score`` (dB per prompt).
    """

    schedule: Schedule
    history: int
    uses_latent: bool = True
    drift: float = 0.5
    ridge: float = 1e-5
    frozen: bool = False
    coefficients: dict[str, Tensor] = field(default_factory=dict)
    residual: dict[str, list[float]] = field(default_factory=dict)
    score: Tensor | None = None
    rings: dict[str, list[Tensor]] = field(default_factory=dict)

    def push(self, branch: str, feature: Tensor) -> None:
        """Keep the feature of a full step, newest first."""
        ring = self.rings.setdefault(branch, [])
        ring.insert(0, feature.clone())
        del ring[self.history :]

    def forecast(self, at: Visit, latent: Tensor, base_latent: Tensor, base: Tensor) -> Tensor:
        """Fit the row of a skipped step on the states at hand, store it, and apply it."""
        ring, rows = self.rings[at.branch], self.coefficients[at.branch]
        regressors = [*ring, latent] if self.uses_latent else ring
        columns = [*range(len(ring)), *([rows.shape[1] - 1] if self.uses_latent else [])]
        if not self.frozen:
            target = base + at.pull * self.drift * (base_latent - latent) if at.pull else base
            fitted = ridge_fit(regressors, target, rows[at.step, columns], self.ridge)
            rows[at.step] = 0
            rows[at.step, columns] = fitted
        weights = rows[at.step, columns].tolist()
        total = sum(weight * part.float() for weight, part in zip(weights, regressors, strict=True))
        assert isinstance(total, Tensor)
        error = (total - base.float()).square().mean() / base.float().square().mean()
        self.residual.setdefault(at.branch, []).append(error.item())
        return total.to(base.dtype)


class Visit(NamedTuple):
    """Where a lane is asked for a forecast; ``pull`` is 1 / dsigma, 0 without drift correction."""

    step: int
    branch: str
    pull: float


def ridge_fit(regressors: list[Tensor], target: Tensor, start: Tensor, ridge: float) -> Tensor:
    """argmin_c |sum_k c_k r_k - target|^2 + p |c - start|^2, p = ridge x mean_k |r_k|^2.

    Inner products are taken in float64 where the tensors are; the result ``[K]`` is on the CPU.
    """
    matrix = torch.stack([part.double().flatten() for part in regressors])
    moments = (matrix @ matrix.T).cpu()
    onto = (matrix @ target.double().flatten()).cpu()
    pull = ridge * moments.diagonal().mean() * torch.eye(len(start), dtype=torch.float64)
    return start + torch.linalg.solve(moments + pull, onto - moments @ start)


class LockStep:
    """Controller of the shared call: computes base rows and full rows, forecasts the others."""

    def __init__(self, job: Job, lanes: Sequence[Lane], prior: Prior) -> None:
        self.job, self.lanes, self.prior = job, lanes, prior
        # The latent follows x' = x + dsigma v only for a first-order flow sampler.
        flow = "FlowMatchEuler" in type(job.pipe.scheduler).__name__
        self.corrects = flow and job.tap == "output"

    def __call__(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step, latent = followed(denoiser, kwargs), denoiser.latent(args, kwargs)
        call = _Batch(denoiser, args, kwargs, len(latent))
        count = len(latent) // (1 + len(self.lanes))
        places = [range(n * count, (n + 1) * count) for n in range(1 + len(self.lanes))]
        full = [True, *(lane.schedule.is_full(step.index) for lane in self.lanes)]
        needed = [
            row for place, is_full in zip(places, full, strict=True) if is_full for row in place
        ]
        kind, output, feature = call.compute(needed, self.job)
        rate = step.sigmas[step.index + 1] - step.sigmas[step.index]
        visit = Visit(step.index, step.branch, 1 / rate if self.corrects else 0.0)
        base = slice(0, count)
        for lane, place, is_full in zip(self.lanes, places[1:], full[1:], strict=True):
            rows = slice(place.start, place.stop)
            if is_full:
                lane.push(step.branch, feature[rows])
                continue
            if step.branch not in lane.coefficients:
                lane.coefficients[step.branch] = self.prior(lane.schedule, step.sigmas, step.branch)
            forecast = lane.forecast(visit, latent[rows], latent[base], feature[base])
            output[rows] = forecast if self.job.tap == "output" else call.tail(forecast, place)
        return make_output(kind, output)


@dataclass
class _Batch:
    """One call of the denoiser that can be computed row by row."""

    denoiser: Denoiser
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    total: int

    def rows(self, rows: Sequence[int]) -> Any:
        """The call's arguments for some rows."""
        return take_rows((self.args, self.kwargs), rows, self.total, self.denoiser.spec.unbatched)

    def compute(self, rows: list[int], job: Job) -> tuple[type, Tensor, Tensor]:
        """Run the model on these rows, a batch at a time: class of its output, sample, feature.

        Sample and feature are ``[total, ...]``, zero in the other rows.
        """
        parts = [
            rows[start : start + job.batch_size] for start in range(0, len(rows), job.batch_size)
        ]
        output = feature = None
        for part in parts:
            args, kwargs = self.rows(part)
            result, tapped, _ = self.denoiser.run(args, kwargs, tap=job.tap == "hidden")
            sample = read_sample(result)
            tapped = sample if job.tap == "output" else tapped
            assert sample is not None and tapped is not None  # collect has refused such models
            if output is None or feature is None:
                output = sample.new_zeros(self.total, *sample.shape[1:])
                feature = tapped.new_zeros(self.total, *tapped.shape[1:])
            output[part], feature[part] = sample, tapped
        assert output is not None and feature is not None
        return type(result), output, feature

    def tail(self, feature: Tensor, rows: Sequence[int]) -> Tensor:
        """The sample that a forecast hidden feature leads to."""
        sample = read_sample(self.denoiser.run_tail(feature, *self.rows(rows)).output)
        assert sample is not None
        return sample


def take_rows(value: Any, rows: Sequence[int], total: int, unbatched: Sequence[str] = ()) -> Any:
    """``value`` with every tensor whose first dimension is ``total`` reduced to ``rows``, through
    tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value[list(rows)] if value.ndim and len(value) == total else value
    if isinstance(value, dict):
        return {
            k: v if k in unbatched else take_rows(v, rows, total, unbatched)
            for k, v in value.items()
        }
    if isinstance(value, (tuple, list)):
        return type(value)(take_rows(item, rows, total, unbatched) for item in value)
    return value


def run_lanes(job: Job, lanes: Sequence[Lane], prior: Prior, num_inference_steps: int) -> None:
    """Run base and lanes side by side; fills each lane's coefficients, residuals and score.

    The score of a prompt is 10 log10 of the base latent's mean square over the mean squared error
    of the lane's final latent, in dB.
    """
    count, copies = len(job.prompts), 1 + len(lanes)
    for lane in lanes:
        lane.rings, lane.residual, lane.coefficients = {}, {}, {}
    noise = [generator for _ in range(copies) for generator in job.generators(0, count)]
    attach(job.model, LockStep(job, lanes, prior), job.pipe)
    try:
        final = job.run(list(job.prompts) * copies, noise, num_inference_steps)
    finally:
        detach(job.model)
    runs = final.double().flatten(1).reshape(copies, count, -1)
    for lane, run in zip(lanes, runs[1:], strict=True):
        lane.rings = {}
        error = (run - runs[0]).square().mean(1) / runs[0].square().mean(1)
        lane.score = -10 * torch.log10(error + 1e-12)
