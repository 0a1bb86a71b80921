"""One call of the denoiser that can be computed row by row."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lesa.hooks.batch_rows import pick_arguments
from lesa.hooks.denoiser import Denoiser
from lesa.hooks.outputs import ListOf, WithVariance, kind_of, read_sample
from lesa.training.job import Job, in_batches, sample_of, sampled
from lesa.training.row_fit import Tail

__all__ = ["Batch", "Computed"]

# Kind of an output, sample, feature.
Computed = tuple[type | ListOf | WithVariance, Tensor, Tensor]


@dataclass
class Batch:
    """A call's arguments by name, of which some rows at a time are run."""

    denoiser: Denoiser
    given: dict[str, Any]
    total: int

    def rows(self, rows: Sequence[int]) -> dict[str, Any]:
        """The call's arguments for some rows."""
        return pick_arguments(self.given, self.denoiser.spec, rows, self.total)

    def tail(self, rows: Sequence[int]) -> Tail:
        """From a forecast hidden feature ``[parts, pictures, ...]`` of these rows to the sample."""
        given = self.rows(rows)

        def sample(feature: Tensor) -> Tensor:
            behind = self.denoiser.run_tail(feature.flatten(0, 1), (), given)
            found = sample_of(self.denoiser, behind.output, self.denoiser.latent((), given))
            assert found is not None
            return found.unflatten(0, feature.shape[:2])

        return sample

    def compute(self, rows: list[int], job: Job, known: Computed | None = None) -> Computed:
        """Run the model on these rows, a batch at a time: class of its output, sample, feature.

        Sample and feature are ``[total, ...]``, zero in the other rows. Where several ranks share
        the work each runs whole batches, and all get all of them; ``known`` is what an earlier call
        of this shape gave, for a rank that has no batch.
        """
        own = job.ranks.share(in_batches(rows, job.batch_size))
        done = sum(map(len, own))
        if own or known is None:
            kind, output, feature = self._own(own or [rows[:1]], job, kept=bool(own))
        else:
            kind, output = known[0], torch.zeros_like(known[1])
            feature = output if known[2] is known[1] else torch.zeros_like(known[2])
        if len(rows) > done:
            job.work.computed(len(rows) - done)
        for part in {id(output): output, id(feature): feature}.values():
            job.ranks.assemble(part)
        return kind, output, feature

    def _own(self, batches: Sequence[Sequence[int]], job: Job, kept: bool) -> Computed:
        """This rank's batches; zeros of their shape where they are not ``kept``."""
        output = feature = None
        started = time.perf_counter()
        for part in batches:
            given = self.rows(part)
            result, tapped, _ = self.denoiser.run((), given, tap=job.tap == "hidden")
            whole = read_sample(result)
            assert whole is not None  # collect has refused such models
            sample = sampled(self.denoiser, whole, self.denoiser.latent((), given))
            tapped = sample if job.tap == "output" else tapped
            assert tapped is not None  # as well
            if output is None or feature is None:
                feature = output = sample.new_zeros(self.total, *sample.shape[1:])
                if tapped is not sample:
                    feature = tapped.new_zeros(self.total, *tapped.shape[1:])
            if kept:
                index = torch.tensor(part, device=sample.device)
                output[index], feature[index] = sample, tapped
                job.work.computed(len(part))
        assert output is not None and feature is not None
        output.flatten()[:1].cpu()  # waits for a device
        job.work.took(sum(map(len, batches)), time.perf_counter() - started)
        kind = kind_of(result)
        return kind if sample is whole else WithVariance(kind), output, feature
