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
from typing import Any

import torch
from torch import Tensor

from lesa.errors import LesaError
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
    _rings: dict[str, list[Tensor]] = field(default_factory=dict)


class LockStep:
    """Controller of the shared call: computes base rows and full rows, forecasts the others."""

    def __init__(
        self, lanes: Sequence[Lane], prior: Prior, tap: str, chunk: int, correctable: bool
    ) -> None:
        self.lanes, self.prior, self.tap, self.chunk, self.correctable = (
            lanes,
            prior,
            tap,
            chunk,
            correctable,
        )
        self._priors: dict[tuple[int, str], Tensor] = {}

    def __call__(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = followed(denoiser, kwargs)
        latent = denoiser.latent(args, kwargs)
        total, count = len(latent), len(latent) // (1 + len(self.lanes))
        full = [lane.schedule.is_full(step.index) for lane in self.lanes]
        rows = [
            row
            for copy, needed in enumerate([True, *full])
            for row in range(copy * count, (copy + 1) * count)
            if needed
        ]
        kind, output, feature = self._compute(denoiser, args, kwargs, rows, total)
        base = feature[:count]
        for number, lane in enumerate(self.lanes):
            place = slice((number + 1) * count, (number + 2) * count)
            if full[number]:
                ring = lane._rings.setdefault(step.branch, [])
                ring.insert(0, feature[place].clone())
                del ring[lane.history :]
                continue
            rate = step.sigmas[step.index + 1] - step.sigmas[step.index]
            row = self._fit(
                number,
                step.index,
                step.branch,
                step.sigmas,
                latent[place],
                latent[:count],
                base,
                rate,
            )
            forecast = self._mix(lane, step.branch, row, latent[place])
            if self.tap == "output":
                output[place] = forecast
            else:
                part = take_rows(
                    (args, kwargs),
                    list(range(place.start, place.stop)),
                    total,
                    denoiser.spec.unbatched,
                )
                output[place] = read_sample(denoiser.run_tail(forecast, *part))
        return make_output(kind, output)

    def _compute(
        self, denoiser: Denoiser, args: Any, kwargs: Any, rows: list[int], total: int
    ) -> tuple[type, Tensor, Tensor]:
        """Run the model on the needed rows, ``chunk`` at a time; the other rows of the results
        are zero."""
        output = feature = None
        for start in range(0, len(rows), self.chunk):
            part = rows[start : start + self.chunk]
            result, hidden = denoiser.run(
                *take_rows((args, kwargs), part, total, denoiser.spec.unbatched),
                tap=self.tap == "hidden",
            )
            sample = read_sample(result)
            tapped = hidden if self.tap == "hidden" else sample
            if sample is None or tapped is None:
                raise LesaError(
                    f"closed-loop fit: {type(denoiser.model).__name__} gave no single tensor to tap"
                )
            if output is None or feature is None:
                output, feature = (
                    sample.new_zeros(total, *sample.shape[1:]),
                    tapped.new_zeros(total, *tapped.shape[1:]),
                )
            output[part] = sample
            feature[part] = tapped
        assert output is not None and feature is not None
        return type(result), output, feature

    def _prior_rows(self, number: int, branch: str, sigmas: tuple[float, ...]) -> Tensor:
        key = (number, branch)
        if key not in self._priors:
            lane = self.lanes[number]
            self._priors[key] = self.prior(lane.schedule, sigmas, branch).double()
            lane.coefficients[branch] = torch.zeros_like(self._priors[key])
        return self._priors[key]

    def _fit(
        self,
        number: int,
        step: int,
        branch: str,
        sigmas: tuple[float, ...],
        latent: Tensor,
        base_latent: Tensor,
        base: Tensor,
        rate: float,
    ) -> Tensor:
        """Ridge regression of the drift-correcting target on ring and latent, over all prompts at
        once, in float64."""
        lane, prior = self.lanes[number], self._prior_rows(number, branch, sigmas)[step]
        if not lane.frozen:
            ring = lane._rings[branch]
            regressors = [*ring, latent] if lane.uses_latent else ring
            columns = [*range(len(ring)), *([len(prior) - 1] if lane.uses_latent else [])]
            matrix = torch.stack([r.double().flatten() for r in regressors])
            target = base.double().flatten()
            if self.correctable:
                target = (
                    target + lane.drift / rate * (base_latent.double() - latent.double()).flatten()
                )
            start = prior[columns]
            moments = matrix @ matrix.T
            pull = (
                lane.ridge
                * moments.diagonal().mean()
                * torch.eye(len(columns), dtype=torch.float64)
            )
            solution = start + torch.linalg.solve(
                moments + pull, matrix @ (target - start @ matrix)
            )
            prior = torch.zeros_like(prior)
            prior[columns] = solution
            rest = (
                solution @ matrix - base.double().flatten()
            ).square().mean() / base.double().square().mean()
            lane.residual.setdefault(branch, []).append(float(rest))
        lane.coefficients[branch][step] = prior
        return prior

    @staticmethod
    def _mix(lane: Lane, branch: str, row: Tensor, latent: Tensor) -> Tensor:
        ring = lane._rings[branch]
        total = sum(float(c) * feature.float() for c, feature in zip(row, ring, strict=False))
        if lane.uses_latent:
            total = total + float(row[-1]) * latent.float()
        return total.to(ring[0].dtype)  # type: ignore[union-attr]


def take_rows(value: Any, rows: list[int], total: int, unbatched: Sequence[str] = ()) -> Any:
    """``value`` with every tensor whose first dimension is ``total`` reduced to ``rows``, through
    tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == total else value
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
        lane._rings, lane.residual = {}, {}
    flow = "FlowMatch" in type(job.pipe.scheduler).__name__
    controller = LockStep(lanes, prior, job.tap, job.batch_size, flow and job.tap == "output")
    noise = [generator for _ in range(copies) for generator in job.generators(0, count)]
    attach(job.model, controller, job.pipe)
    try:
        final = job.run(list(job.prompts) * copies, noise, num_inference_steps)
    finally:
        detach(job.model)
    runs = final.double().flatten(1).reshape(copies, count, -1)
    for lane, run in zip(lanes, runs[1:], strict=True):
        lane._rings = {}
        error = (run - runs[0]).square().mean(1) / runs[0].square().mean(1)
        lane.score = -10 * torch.log10(error + 1e-12)
