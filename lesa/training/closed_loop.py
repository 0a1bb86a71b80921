"""Phase 3: fit coefficients in lock-step with the base run, on the states that the accelerated
run really visits.

One call of the plain pipeline carries several copies of the calibration prompts in its batch: the
base run and one *rollout* per step list. At a step that a rollout skips, its rows of the
denoiser's output are replaced by the forecast that has just been fitted, so the sampler, the
guidance and everything else of the pipeline act on all rollouts alike. A rollout's full steps and
the base rows are the only ones that are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.hooks.denoiser import Denoiser, ListOf, kind_of, make_output, read_sample
from lesa.hooks.step_clock import Step
from lesa.training.base_run import BaseRun
from lesa.training.job import Job, followed, parts_of
from lesa.training.rollout import Rollout, RolloutState, Visit
from lesa.training.row_fit import Tail
from lesa.training.statistics import Statistics

Prior = Callable[[Schedule, tuple[float, ...], str], Tensor]  # -> [steps, K + uses_latent]


class LockStep:
    """Controller of the shared call: computes base rows and full rows, forecasts the others.

    The rows of a call are ``[parts, 1 + rollouts, pictures]``: a batched guidance part holds the
    base run's pictures, then every rollout's. A rollout that still follows the first one is handed
    that one's outputs.
    """

    def __init__(
        self,
        job: Job,
        rollouts: Sequence[Rollout],
        prior: Prior | None,
        statistics: Statistics | None,
        prompts: Sequence[int],
        base: BaseRun | None,
        with_base: bool,
    ) -> None:
        self.job, self.rollouts, self.prior, self.with_base = job, rollouts, prior, with_base
        self.statistics, self.base = statistics, base
        self.which = job.pictures_of(prompts)
        self.pictures = len(self.which)
        self.last: dict[tuple[str, int], tuple[type | ListOf, Tensor, Tensor]] = {}

    def __call__(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step, latent = followed(denoiser, kwargs), denoiser.latent(args, kwargs)
        batch = _Batch(denoiser, args, kwargs, len(latent))
        places = self._places(len(latent))
        full = [True, *(each.spec.schedule.is_full(step.index) for each in self.rollouts)]
        source = [self._source(copy, step.index) for copy in range(len(full))]
        own = [full[copy] and source[copy] == copy for copy in range(len(full))]
        kind, output, feature = self._compute(batch, step.branch, places[:, own])
        outputs, features, latents = (
            part.unflatten(0, places.shape) for part in (output, feature, latent)
        )
        at = self._visit(step, steers=latent.shape == output.shape)
        base_latent, base_output = self._base(step, latents, outputs)
        for copy, rollout in enumerate(self.rollouts, 1):
            if full[copy]:
                rollout.push(step.branch, features[:, source[copy]])
            if source[copy] != copy:
                outputs[:, copy] = outputs[:, source[copy]]
            elif not full[copy]:
                self._start(rollout, step, parts=len(places))
                tail = self._tail(batch, places[:, copy])
                outputs[:, copy] = rollout.forecast(
                    at, latents[:, copy], base_latent, base_output, tail
                )
        outputs[:, 0] = outputs[:, source[0]]
        return make_output(kind, output)

    def _base(self, step: Step, latents: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Latent ``[1 or parts, pictures, ...]`` and output ``[parts, pictures, ...]`` of the base
        run, which is at work or has been kept; of rollouts that fit nothing nobody asks for them.
        """
        if self.with_base or self.base is None:
            if self.base is not None:
                self.base.put(step.index, step.branch, self.which, latents[0, 0], outputs[:, 0])
            return latents[:, 0], outputs[:, 0]
        latent, output = self.base.at(step.index, step.branch, self.which, latents.device)
        return latent[None], output

    def _places(self, rows: int) -> Tensor:
        """The rows of a call, ``[parts, copies, pictures]``."""
        copies = 1 + len(self.rollouts)
        parts = parts_of(rows, copies * self.pictures)
        return torch.arange(rows).reshape(parts, copies, self.pictures)

    def _start(self, rollout: Rollout, step: Step, parts: int) -> None:
        """Give a rollout the prior's rows where it has none of this branch."""
        if step.branch not in rollout.result.coefficients:
            assert self.prior is not None  # rollouts without given rows come with one
            rows = self.prior(rollout.spec.schedule, step.sigmas, step.branch)
            apart = step.parts == parts and self._knows_guidance()
            rollout.start(step.branch, rows, parts if apart else 1)

    def _tail(self, batch: _Batch, places: Tensor) -> Tail | None:
        """What leads from a forecast to an output; None where the output itself is forecast."""
        return batch.tail(places.flatten().tolist()) if self.job.tap == "hidden" else None

    def _compute(
        self, batch: _Batch, branch: str, rows: Tensor
    ) -> tuple[type | ListOf, Tensor, Tensor]:
        """The model on some rows; where there are none, tensors of the shapes of the last time."""
        key = branch, batch.total
        if rows.numel() or key not in self.last:
            self.last[key] = batch.compute(rows.flatten().tolist() or [0], self.job)
        kind, output, feature = self.last[key]
        return kind, output.clone(), feature

    def _source(self, copy: int, step: int) -> int:
        """The copy whose states this one has at a step: the first rollout's until it leaves, and in
        the base run's place where that is not run."""
        follows = not self.with_base if copy == 0 else step < self.rollouts[copy - 1].spec.leaves
        return 1 if follows else copy

    def _knows_guidance(self) -> bool:
        """Whether the weights are known by which the tapped features of a picture are summed."""
        known = None if self.statistics is None else self.statistics.sampler
        return known is not None and known.trusted and self.job.tap == "output"

    def _visit(self, step: Step, steers: bool) -> Visit:
        """What is known of the sampler at this step."""
        known, sigma = self.statistics, step.sigmas[step.index]
        if known is None or known.sampler is None or not steers:
            return Visit(step.index, step.branch, sigma=sigma)
        sampler = known.sampler
        rates = sampler.rates[step.index]
        pull = float(sampler.keep[step.index] / rates.sum()) if sampler.trusted else 0.0
        rate = float(rates[known.places(step.branch)].sum())
        return Visit(step.index, step.branch, known.weights(step.branch), rate, pull, sigma)


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

    def tail(self, rows: Sequence[int]) -> Tail:
        """From a forecast hidden feature ``[parts, pictures, ...]`` of these rows to the sample."""
        args, kwargs = self.rows(rows)

        def sample(feature: Tensor) -> Tensor:
            behind = self.denoiser.run_tail(feature.flatten(0, 1), args, kwargs)
            found = read_sample(behind.output)
            assert found is not None
            return found.unflatten(0, feature.shape[:2])

        return sample

    def compute(self, rows: list[int], job: Job) -> tuple[type | ListOf, Tensor, Tensor]:
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
            index = torch.tensor(part, device=sample.device)
            output[index], feature[index] = sample, tapped
            job.work.computed(len(part))
        assert output is not None and feature is not None
        return kind_of(result), output, feature


def take_rows(value: Any, rows: Sequence[int], total: int, unbatched: Sequence[str] = ()) -> Any:
    """``value`` with every tensor whose first dimension is ``total`` reduced to ``rows``, through
    tuples, lists and dicts.

    The numbers of the rows are copied once to each device on which such a tensor lies.
    """
    index = cache(lambda device: torch.tensor(rows, device=device))

    def taken(value: Any) -> Any:
        if isinstance(value, Tensor):
            whole = not value.ndim or len(value) != total
            return value if whole else value[index(value.device)]
        if isinstance(value, dict):
            return {k: v if k in unbatched else taken(v) for k, v in value.items()}
        if isinstance(value, list) and len(value) == total and all(map(torch.is_tensor, value)):
            return [value[row] for row in rows]  # one for every picture
        if isinstance(value, (tuple, list)):
            return type(value)(map(taken, value))
        return value

    return taken(value)


def steps_computed(rollouts: Sequence[Rollout], base_steps: int = 0) -> int:
    """How many steps of each picture `run_rollouts` computes in full: the base run's, and of every
    rollout the full ones since it left the first."""
    return base_steps + sum(
        step >= rollout.spec.leaves
        for rollout in rollouts
        for step in rollout.spec.schedule.full_steps
    )


def run_rollouts(
    job: Job,
    rollouts: Sequence[Rollout],
    prior: Prior | None,
    num_inference_steps: int,
    statistics: Statistics | None = None,
    base: Tensor | None = None,
    prompts: Sequence[int] | None = None,
) -> Tensor:
    """Run base and rollouts side by side; fills each rollout's result.

    With ``statistics`` the fits know guidance weights and sampler. The score of a picture is
    10 log10 of the base latent's mean square over the mean squared error of the rollout's final
    latent, in dB. Returns the base run's final latents, ``[pictures, elements]``; with them as
    ``base`` rollouts that fit nothing run without it. The base run itself is kept, and run once.
    ``prompts`` are the rows of those that run.

    Final latents, and with them errors and scores, lie on the host in float64, wherever the
    pipeline is: they are copied once per run.
    """
    rows, copies = [*(range(len(job.prompts)) if prompts is None else prompts)], 1 + len(rollouts)
    for rollout in rollouts:
        rollout.begin()
    kept, known = job.kept_base(num_inference_steps), base is not None
    if kept is None and not known and prompts is None:
        kept = job.new_base(num_inference_steps)
    with_base = not known and (kept is None or kept.final is None)
    step = LockStep(job, rollouts, prior, statistics, rows, kept, with_base)
    with job.controlled(step):
        final = job.run(rows * copies, num_inference_steps)
    ends = final.cpu().double().reshape(copies, len(rows) * job.pictures, -1)
    if kept is not None and with_base:
        kept.final = ends[0]
    if base is None and kept is not None and kept.final is not None:
        base = kept.final[job.pictures_of(rows)]
    elif base is None:
        base = ends[0]
    for rollout, end in zip(rollouts, ends[1:], strict=True):
        rollout.state = RolloutState()
        error = (end - base) / base.square().mean(1, keepdim=True).sqrt()
        rollout.result.error = error
        rollout.result.score = -10 * torch.log10(error.square().mean(1) + 1e-12)
    return base
