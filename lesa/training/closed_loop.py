"""Phase 3: fit coefficients on the states that the accelerated run really visits.

One call of the plain pipeline carries several copies of the calibration prompts in its batch, one
per *rollout*, that is per step list and setting. At a step that a rollout skips, its rows of the
denoiser's output are replaced by the forecast that has just been fitted to the plain run, which has
been kept, so the sampler, the guidance and everything else of the pipeline act on all rollouts
alike. Only full steps are computed, and those that several rollouts have in common only once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.hooks.denoiser import Denoiser
from lesa.hooks.outputs import make_output
from lesa.hooks.step_clock import Step
from lesa.training.base_run import BaseRun
from lesa.training.batch import Batch, Computed
from lesa.training.collect import collect
from lesa.training.job import Job, followed, parts_of
from lesa.training.prefixes import Prefixes
from lesa.training.rollout import Rollout, RolloutState, Tails, Visit
from lesa.training.statistics import Statistics
from lesa.util.numerics import free_memory

Prior = Callable[[Schedule, tuple[float, ...], str], Tensor]  # -> [steps, K + uses_latent]
MEMORY = 0.4  # share of the free memory that rollouts of one call may take


class LockStep:
    """Controller of the shared call: computes full rows, forecasts the others.

    The rows of a call are ``[parts, rollouts, pictures]``: a batched guidance part holds every
    rollout's pictures. A rollout that has been dropped goes along the plain run, at no cost.
    """

    def __init__(
        self,
        job: Job,
        rollouts: Sequence[Rollout],
        prior: Prior | None,
        statistics: Statistics | None,
        prompts: Sequence[int],
        base: BaseRun,
    ) -> None:
        self.job, self.rollouts, self.prior, self.base = job, rollouts, prior, base
        self.statistics = statistics
        self.which, self.fitted = job.pictures_of(prompts), job.fitted_among(prompts)
        self.prefixes = Prefixes([rollout.spec for rollout in rollouts])
        self.last: dict[tuple[str, int], Computed] = {}

    def __call__(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step, latent = followed(denoiser, kwargs), denoiser.latent(args, kwargs)
        batch = Batch(denoiser, denoiser.named(args, kwargs), len(latent))
        places = self._places(len(latent))
        latents = latent.unflatten(0, places.shape)
        full = self.prefixes.computed(step.index)
        kind, output, feature = self._compute(batch, step.branch, places[:, full])
        at = self._visit(step, steers=latent.shape == output.shape)
        outputs, features = (part.unflatten(0, places.shape) for part in (output, feature))
        features = {copy: features[:, copy].clone() for copy in full}
        base = cache(lambda: self.base.at(step.index, step.branch, self.which, latent.device))
        for copy, rollout in enumerate(self.rollouts):
            source = self.prefixes.source(copy, step.index)
            if source is None:
                outputs[:, copy] = base()[1]
                continue
            if rollout.spec.schedule.is_full(step.index):
                rollout.push(step.branch, features[source])
            else:
                self._start(rollout, step, parts=len(places))
            if source != copy:
                outputs[:, copy] = outputs[:, source]
                rollout.follow(self.rollouts[source], at)
            elif copy not in features:
                tails = self._tails(batch, places[:, copy])
                known = None if rollout.spec.frozen else base()
                outputs[:, copy] = rollout.forecast(at, latents[:, copy], known, tails, self.fitted)
        return make_output(kind, output)

    def _places(self, rows: int) -> Tensor:
        """The rows of a call, ``[parts, rollouts, pictures]``."""
        copies, pictures = len(self.rollouts), len(self.which)
        return torch.arange(rows).reshape(parts_of(rows, copies * pictures), copies, pictures)

    def _start(self, rollout: Rollout, step: Step, parts: int) -> None:
        """Give a rollout the prior's rows where it has none of this branch."""
        if step.branch not in rollout.result.coefficients:
            assert self.prior is not None  # rollouts without given rows come with one
            rows = self.prior(rollout.spec.schedule, step.sigmas, step.branch)
            apart = step.parts == parts and self._knows_guidance()
            rollout.start(step.branch, rows, parts if apart else 1)

    def _tails(self, batch: Batch, places: Tensor) -> Tails | None:
        """What makes that which leads from a forecast to an output; None where the output itself
        is forecast."""
        if self.job.tap != "hidden":
            return None
        return lambda some: batch.tail(
            (places if some is None else places[:, [*some]]).flatten().tolist()
        )

    def _compute(self, batch: Batch, branch: str, rows: Tensor) -> Computed:
        """The model on some rows; where there are none, tensors of the shapes of the last time."""
        key = branch, batch.total
        if rows.numel() or key not in self.last:
            known = self.last.get(key)
            self.last[key] = batch.compute(rows.flatten().tolist() or [0], self.job, known)
        kind, output, feature = self.last[key]
        return kind, output.clone(), feature

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


def steps_computed(rollouts: Sequence[Rollout]) -> int:
    """How many steps of each picture `run_rollouts` computes in full."""
    prefixes = Prefixes([rollout.spec for rollout in rollouts])
    steps = rollouts[0].spec.schedule.steps if rollouts else 0
    return sum(len(prefixes.computed(step)) for step in range(steps))


def run_rollouts(
    job: Job,
    rollouts: Sequence[Rollout],
    prior: Prior | None,
    num_inference_steps: int,
    statistics: Statistics | None = None,
    prompts: Sequence[int] | None = None,
) -> None:
    """Run rollouts side by side; fills each one's result.

    With ``statistics`` the fits know guidance weights and sampler. ``prompts`` are the numbers of
    those that run; rows are fitted to those among them that are not held out. The plain run is
    collected first where it has not been kept.

    Of every rollout, picture and guidance part there are in memory K + `lesa.training.work.HELD`
    features and the picture's own arguments of the denoiser; where all rollouts together would take
    more than `MEMORY` of what is free they run in several calls.

    Final latents, and with them errors and scores, lie on the host in float64, wherever the
    pipeline is: they are copied once per run.

    Several ranks run what the first one was told, and find what it finds: no later decision can
    differ between them.
    """
    if not rollouts:
        return
    rows = [*(range(len(job.prompts)) if prompts is None else prompts)]
    specs, rows = job.ranks.told(([rollout.spec for rollout in rollouts], rows))
    for rollout, spec in zip(rollouts, specs, strict=True):
        rollout.spec = spec
    if job.kept_base(num_inference_steps) is None:
        collect(job, num_inference_steps)
    base = job.kept_base(num_inference_steps)
    assert base is not None  # collected
    for group in _groups(job, rollouts, len(rows)):
        some = [rollouts[i] for i in group]
        _run_together(job, some, LockStep(job, some, prior, statistics, rows, base), rows)


def _run_together(
    job: Job, rollouts: Sequence[Rollout], step: LockStep, prompts: Sequence[int]
) -> None:
    """One call of the pipeline for all of these; fills their results."""
    for rollout in rollouts:
        rollout.begin()
    with job.controlled(step):
        final = job.run([*prompts] * len(rollouts), step.base.steps)
    found = [rollout.result for rollout in rollouts]
    kept = [part for r in found for part in (*r.coefficients.values(), *r.shared.values())]
    job.ranks.same([final, *kept])
    ends = final.cpu().double().reshape(len(rollouts), len(prompts) * job.pictures, -1)
    assert step.base.final is not None  # collected
    target = step.base.final[job.pictures_of(prompts)]
    for rollout, end in zip(rollouts, ends, strict=True):
        rollout.state = RolloutState()
        rollout.result.error = (end - target) / target.square().mean(1, keepdim=True).sqrt()


def _groups(job: Job, rollouts: Sequence[Rollout], prompts: int) -> list[range]:
    """Rollouts that run in one call: as many as `MEMORY` of what is free has room for."""
    each = prompts * job.pictures * job.work.bytes_of(max(r.spec.history for r in rollouts))
    free = free_memory(job.device)
    size = max(1, min(len(rollouts), int(MEMORY * free / max(1, each))))
    size = min(job.ranks.everyone(size))
    return [range(at, min(at + size, len(rollouts))) for at in range(0, len(rollouts), size)]


def replay(job: Job, rollout: Rollout, prompt: int) -> Any:
    """What the pipeline decodes for one prompt, ``[2 x pictures, ...]``: the plain run from what
    was kept of it, at no cost, and a rollout with given rows."""
    steps = rollout.spec.schedule.steps
    base = job.kept_base(steps)
    assert base is not None  # the rollout was fitted against it
    twice = [Rollout(rollout.spec), Rollout(rollout.spec)]
    for each in twice:
        each.begin()
    step = LockStep(job, twice, None, None, [prompt], base)
    step.prefixes.drop([0])
    with job.controlled(step):
        return job.run([prompt] * 2, base.steps, output_type="pt")
