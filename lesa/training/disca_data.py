"""Plain runs for the form "disca": what its fit is fitted to, and what judges it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from lesa.hooks.denoiser import Denoiser
from lesa.hooks.plain_copy import ordinary
from lesa.training.job import Job, followed, in_batches, sample_of

__all__ = ["Batch", "Data", "record"]

PICTURES = 256  # of the fit, over all draws of noise for its prompts
JUDGES = 32  # of those that judge
FITTED = 48  # pictures that rows are solved on


@dataclass
class Batch:
    """The plain run of some pictures: what every call of the denoiser got and gave, on the host.

    calls: (step, branch) -> arguments, without the latent. outputs: the same, [rows, ...].
    latents: the denoiser's at each step, [pictures, ...], then the final one.
    """

    calls: dict[tuple[int, str], tuple[Any, Any]] = field(default_factory=dict)
    outputs: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    latents: list[Tensor] = field(default_factory=list)


class Recorder:
    """Controller that runs every step in full and keeps what it saw of one batch."""

    def __init__(self, job: Job, pictures: int) -> None:
        self.job, self.pictures, self.batch = job, pictures, Batch()

    def __call__(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step, batch = followed(denoiser, kwargs), self.batch
        latent, output = denoiser.latent(args, kwargs), denoiser.run(args, kwargs).output
        sample = sample_of(denoiser, output, latent)
        assert sample is not None  # the collection has refused other models
        if len(batch.latents) == step.index:
            batch.latents.append(_kept(latent[: self.pictures]))
        given = denoiser.named(args, kwargs)
        others = {name: part for name, part in given.items() if name != denoiser.spec.latent}
        batch.calls[step.index, step.branch] = tree_map(_kept, others)
        batch.outputs[step.index, step.branch] = _kept(sample)
        self.job.work.computed(len(sample))
        return output


def record(job: Job, rows: Sequence[int], num_steps: int) -> Batch:
    """The plain run of some prompts."""
    recorder = Recorder(job, len(rows) * job.pictures)
    with job.controlled(recorder):
        final = job.run(rows, num_steps)
    batch = recorder.batch
    batch.latents.append(_kept(final).reshape(batch.latents[-1].shape))
    return batch


@dataclass
class Data:
    """Plain runs in batches.

    fitted: those of the fit. few: as many of them as rows are solved on. judged: those that judge.
    apart: whether fitted and judged share no prompt.
    """

    fitted: list[Batch]
    few: list[Batch]
    judged: list[Batch]
    apart: bool

    @classmethod
    def of(cls, job: Job, num_steps: int) -> Data:
        """Record them, with several draws of noise for each prompt."""
        learns, judges = job.fitted, sorted(job.held_out)
        draws = _draws(PICTURES, learns, job), _draws(JUDGES, judges, job)
        runs = draws[0] * len(learns) + draws[1] * len(judges)
        with job.phase("plain runs", runs * job.pictures * num_steps * job.work.width) as bar:
            bar.detail = f"{runs} draws, {len(learns)} prompts to fit, {len(judges)} to judge"
            fitted, judged = (
                [
                    record(_drawn(job, draw), rows, num_steps)
                    for draw in range(count)
                    for rows in in_batches(of, job.batch_size)
                ]
                for count, of in zip(draws, (learns, judges), strict=True)
            )
        few = fitted[: max(1, FITTED // job.batch_size)]
        return cls(fitted, few, judged or few, bool(judges))


def _drawn(job: Job, draw: int) -> Job:
    """The job with another noise for every picture."""
    return replace(job, seed=job.seed + draw * len(job.prompts) * job.pictures)


def _draws(pictures: int, rows: Sequence[int], job: Job) -> int:
    """How often each of these prompts is drawn, to have about so many pictures."""
    return max(1, round(pictures / (len(rows) * job.pictures))) if rows else 0


def _kept(part: Any) -> Any:
    return ordinary(part.detach().to("cpu")) if isinstance(part, Tensor) else part
