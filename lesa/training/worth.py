"""What a fitted list is worth: decoded pictures of held-out prompts, against the plain run's."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from lesa.errors import LesaError
from lesa.forecasters.worth import Worth
from lesa.training.closed_loop import replay
from lesa.training.job import Job
from lesa.training.rollout import Rollout
from lesa.training.row_fit import applied
from lesa.util.perceptual import lpips, lpips_is_missing, psnr
from lesa.util.ranks import Ranks

__all__ = ["judges", "measure"]

JUDGES = 16  # prompts: the 10th percentile of the four that are held out of 16 says little
REPEATS = 5  # of the mix of cached features, of which the fastest counts


def judges(job: Job) -> list[int]:
    """The numbers of the prompts that tell what a list is worth: those held out, or all."""
    return sorted(job.held_out) or [*range(len(job.prompts))]


def measure(
    job: Job,
    rollout: Rollout,
    others: Mapping[int, Rollout] = MappingProxyType({}),
    beside: int = 0,
) -> Worth | None:
    """PSNR in dB, and LPIPS where its weights are installed, of every picture of the prompts that
    judge; None, with a line that says so, where the pipeline decodes to no tensor of pictures.
    `others` are the rollouts of prompts that a guard lets run something else.

    So many fitted prompts may be judged `beside` those that are held out, up to `JUDGES` together.
    They fare no better: on four embedded pipelines with 13 to 6 of 50 steps in full, the p10 of 9
    to 16 prompts was on average 2.0 dB from that of 64 unseen ones, that of the four held out
    4.5 dB (benchmarks/bench_worth.py).

    The plain run is replayed from what was kept of it, so that only the accelerated runs' full
    steps are computed. A prompt is decoded at a time, by one of the ranks that share the work.
    """
    prompts, ranks = judges(job), job.ranks
    room = max(0, min(beside, JUDGES - len(prompts)))
    prompts = sorted([*prompts, *[i for i in job.fitted if i not in prompts][:room]])
    run = {i: others.get(i, rollout).fixed() for i in prompts}
    alone, own, problem = replace(job, ranks=Ranks()), ranks.share(prompts), ""
    found: list[_Judged] = []
    steps = {i: len(run[i].spec.schedule.full_steps) for i in prompts}
    with job.phase("worth in pictures", job.rows(sum(steps.values()), 1)) as bar:
        bar.detail = f"{len(prompts)} prompts"
        try:
            found.extend(_judged(alone, run[prompt], prompt) for prompt in own)
        except LesaError as error:  # the rest of the training is well
            problem = str(error)
        told = ranks.everyone((found, problem))
        job.work.computed(job.rows(sum(steps[i] for i in prompts if i not in own), 1))
        problem = next((text for _, text in told if text), "")
        if problem:
            bar.detail = f"not measured: {problem}"
            bar.extend(bar.completed - bar.total)
            return None
    inorder = [told[i % ranks.size][0][i // ranks.size] for i in range(len(prompts))]
    far = [each.lpips for each in inorder if each.lpips is not None]
    return Worth.of(
        torch.cat([each.psnr for each in inorder]).tolist(),
        validated=bool(job.held_out),
        lpips=torch.cat(far).tolist() if far else None,
        share=_share(job, rollout),
    )


class _Judged(NamedTuple):
    """The pictures of a prompt: dB, and LPIPS where it can be had."""

    psnr: Tensor
    lpips: Tensor | None


def _judged(job: Job, rollout: Rollout, prompt: int) -> _Judged:
    plain, fast = _pictures(job, rollout, prompt)
    looks = plain.ndim >= 4 and lpips_is_missing(plain) is None
    return _Judged(psnr(plain, fast), lpips(plain, fast) if looks else None)


def _pictures(job: Job, rollout: Rollout, prompt: int) -> Tensor:
    """Plain and accelerated pictures of a prompt, floats on the host ``[2, pictures, ...]``.

    Raises LesaError where the pipeline cannot decode, or decodes to no tensor of them.
    """
    if getattr(job.pipe, "vae", job) is None:
        raise LesaError("the pipeline has no vae to decode with")
    try:
        pictures = replay(job, rollout, prompt)
    except Exception as problem:  # no decoder, or no memory for it
        raise LesaError(f"pictures cannot be decoded ({problem})") from problem
    if not isinstance(pictures, Tensor) or not pictures.is_floating_point():
        raise LesaError(f"{type(job.pipe).__name__} decodes to no tensor")
    return pictures.unflatten(0, (2, -1)).float().cpu()


def _share(job: Job, rollout: Rollout) -> float | None:
    """Seconds of a skipped step, which mixes cached features, over those of a full one; None where
    none is skipped."""
    skipped = rollout.spec.schedule.skipped_steps
    if not job.work.timed_rows or not skipped:
        return None
    full = job.work.seconds / job.work.timed_rows * job.work.width
    base = job.kept_base(rollout.spec.schedule.steps)
    assert base is not None
    branch = next(iter(rollout.result.coefficients))
    _, output = base.at(0, branch, [0], next(job.models[0].parameters()).device)
    row = rollout.result.coefficients[branch][skipped[0]]
    parts = [output] * len(row)

    def mixed() -> float:
        started = time.perf_counter()
        applied(row, parts).sum().item()  # waits for a device
        return time.perf_counter() - started

    return min(mixed() for _ in range(REPEATS)) * len(rollout.result.coefficients) / full
