"""Phase 1: run the plain pipeline on the calibration prompts and keep inner products only."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lesa.core.checks import shown
from lesa.errors import LesaError
from lesa.hooks.denoiser import Denoiser, read_sample
from lesa.training.base_run import BaseRun
from lesa.training.job import Job, followed, in_batches, parts_of
from lesa.training.sampler import Sampler
from lesa.training.statistics import Statistics, inner_products
from lesa.training.work import Work


class Collector:
    """Controller that runs every step in full and keeps one batch's trajectory until ``reduce``.

    A branch's features are ``[rows, pictures, D]`` per step: with batched guidance one call holds
    several rows of every picture.
    """

    def __init__(self, tap: str, work: Work, base: BaseRun | None = None) -> None:
        self.tap, self.work, self.base = tap, work, base
        self.sigmas: tuple[float, ...] = ()
        self.pictures, self.first = 1, 0
        self.peak_bytes = 0
        self._forget()

    def _forget(self) -> None:
        self.features: dict[str, list[Tensor]] = {}
        self.latents: list[Tensor] = []

    def __call__(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = followed(denoiser, kwargs)
        self.sigmas = step.sigmas
        output, feature, _ = denoiser.run(args, kwargs, tap=self.tap == "hidden")
        if self.tap == "output":
            feature = read_sample(output)
        if feature is None or read_sample(output) is None:
            raise LesaError(
                f"tap={self.tap!r}: {denoiser.original_class.__name__} returns no single tensor to "
                "train on; accelerate it without training, by lesa.enable(pipe)"
            )
        rows = parts_of(len(feature), self.pictures)
        known = self.features.setdefault(step.branch, [])
        known.append(feature.detach().reshape(rows, self.pictures, -1).clone())
        self.work.feature_bytes = feature[0].nbytes
        self.work.argument_bytes = _row_bytes((args, kwargs), len(feature))
        begins = step.branch == next(iter(self.features))
        self.work.computed(len(feature), done=self.pictures * begins)
        latent = denoiser.latent(args, kwargs)
        if self.base is not None and isinstance(latent, Tensor):
            sample = read_sample(output)
            assert sample is not None  # refused above
            at = range(self.first, self.first + self.pictures)
            parts = sample.unflatten(0, (rows, self.pictures))
            self.base.put(step.index, step.branch, at, latent[: self.pictures], parts)
        alike = isinstance(latent, Tensor) and latent.shape == feature.shape
        if self.tap == "output" and alike and len(self.latents) < len(known):
            self.latents.append(latent[: self.pictures].detach().flatten(1).clone())
        return output

    def reduce(self, final: Tensor) -> Trajectories:
        """The batch that ended in the latents ``final``, as inner products; forgets it.

        Raises LesaError where the branches or their rows changed from step to step.
        """
        branches, latents = self.features, self.latents
        steps = len(self.sigmas) - 1
        rows = {name: len(features[0]) for name, features in branches.items()}
        for name, features in branches.items():
            if len(features) != steps or any(len(part) != rows[name] for part in features):
                raise LesaError(
                    f"guidance branch {name!r} is not the same at all steps of this pipeline: "
                    "train with a call that guides every step alike"
                )
        parts = [
            feature[row]
            for name, features in branches.items()
            for row in range(rows[name])
            for feature in features
        ]
        if len(latents) == steps:
            fits = final.numel() == latents[0].numel()
            parts += [*latents, *([final.flatten(1).to(latents[0])] if fits else [])]
        basis = [*parts, torch.ones_like(parts[0])]
        self.peak_bytes = max(self.peak_bytes, sum(part.nbytes for part in basis))
        grams = [
            inner_products(torch.stack([part[i] for part in basis])) for i in range(self.pictures)
        ]
        joint = torch.stack(grams)
        if not bool(joint.isfinite().all()):
            raise LesaError(
                "the plain run gives values that are not finite: nothing can be learned from it; "
                "run the pipeline in another dtype, or repair it"
            )
        self._forget()
        return Trajectories(rows, len(parts) - steps * sum(rows.values()), joint)


def _row_bytes(arguments: Any, rows: int) -> int:
    """Bytes of the tensors of a call, however nested, that hold so many rows; of one row."""
    leaves = tree_leaves(arguments)
    return sum(
        leaf.nbytes // rows
        for leaf in leaves
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows
    )


class Trajectories(NamedTuple):
    """One batch: rows per branch, number of latents, Gram matrices ``[pictures, M, M]``."""

    rows: dict[str, int]
    num_latents: int
    joint: Tensor


def collect(
    job: Job, num_inference_steps: int, told: Callable[[float], None] | None = None
) -> Statistics:
    """Statistics of the base trajectories at one step count.

    With ``job.folder`` the file is rewritten after every batch, by several ranks after each has had
    one, and an interrupted collection continues where it stopped. At most one batch's features are
    in memory. After the first batch ``told`` is given the seconds that a prompt took. Raises
    LesaError when the folder holds statistics of other prompts or settings.
    """
    name = f"statistics-{num_inference_steps}.safetensors"
    path = None if job.folder is None else job.folder / name
    found = job.ranks.told(_resumed(path, job, job.fingerprint(num_inference_steps)))
    each, probed = job.pictures * num_inference_steps, job.tap == "hidden"
    with job.phase("collect", (len(job.prompts) + probed) * each) as bar:
        found, peak = _collect_rest(job, num_inference_steps, found, path, told)
        if probed:
            found.probed = _probe_sampler(job, num_inference_steps)
        bar.detail = (
            f"{len(job.prompts)} prompts x {num_inference_steps} steps, "
            f"at most {peak / 1e6:.1f} MB of features held"
        )
        if path is not None and job.ranks.leads:
            bar.detail += f", file {path.stat().st_size / 1e6:.2f} MB"
    job.work.width = sum(found.rows.values())
    job.work.plain += job.rows(num_inference_steps)
    return found


def _collect_rest(
    job: Job,
    num_inference_steps: int,
    found: Statistics | None,
    path: Path | None,
    told: Callable[[float], None] | None,
) -> tuple[Statistics, int]:
    """The statistics with the prompts that they lack, and the most bytes of features held.

    Prompts that they have are run once more at last, in the batches that they ran in before: what
    follows needs the plain run of all, to the last bit as if nothing had been interrupted. Several
    ranks run a batch each at a time, and all get all of it.
    """
    total, known = len(job.prompts), 0 if found is None else len(found.prompts)
    base, ranks, size = job.new_base(num_inference_steps), job.ranks, job.batch_size
    collector = Collector(job.tap, job.work, base)
    batches = [*in_batches(range(known, total), size), *in_batches(range(known), size)]
    with job.controlled(collector):
        for together in in_batches(batches, ranks.size):
            own = [*together[ranks.rank : ranks.rank + 1]]
            started = time.perf_counter()
            mine = [_run_batch(job, collector, batch, num_inference_steps) for batch in own]
            if told is not None and batches[0] in together:  # every rank has a batch
                told(ranks.told((time.perf_counter() - started) / len(own[0])))
            found = found or _empty(job, collector, mine[0], num_inference_steps)
            _extend(job, found, together, mine, known)
            if path is not None and ranks.leads:
                found.save(path)
    assert found is not None
    base.finish(ranks)
    return found, collector.peak_bytes


def _run_batch(
    job: Job, collector: Collector, batch: Sequence[int], num_inference_steps: int
) -> Trajectories:
    """The plain run of some prompts."""
    collector.pictures = len(batch) * job.pictures
    collector.first = batch[0] * job.pictures
    final = job.run(batch, num_inference_steps)
    if collector.base is not None:
        collector.base.end(collector.first, final)
    return collector.reduce(final)


def _empty(
    job: Job, collector: Collector, batch: Trajectories, num_inference_steps: int
) -> Statistics:
    """Statistics of no prompt, of the layout that a first batch shows."""
    found = Statistics(collector.sigmas, job.tap, batch.num_latents, batch.rows)
    found.setting = job.fingerprint(num_inference_steps)
    found.depends_on = job.depends_on()
    return found


def _extend(
    job: Job,
    found: Statistics,
    together: Sequence[Sequence[int]],
    mine: Sequence[Trajectories],
    known: int,
) -> None:
    """Add the batches of all ranks, of which one at most is this rank's, but for known prompts."""
    counts = [len(batch) * job.pictures for batch in together]
    size = found.joint_size
    joint = torch.zeros(sum(counts), size, size, dtype=torch.float64)
    parts = joint.split(counts)
    for own in mine:
        parts[job.ranks.rank].copy_(own.joint)
    job.ranks.assemble(joint)
    for batch, part in zip(together, parts, strict=True):
        if batch[0] >= known:
            found.extend(part, [job.prompts[i] for i in batch])
    others = sum(counts) - sum(len(own.joint) for own in mine)
    if others:
        done = others * found.num_steps
        job.work.computed(done * sum(found.rows.values()), done)


def _probe_sampler(job: Job, num_inference_steps: int) -> Sampler | None:
    """How outputs move the latent, from one more run: hidden features do not tell it."""
    collector = Collector("output", job.work)
    with job.controlled(collector):
        rows, num_latents, joint = _run_batch(job, collector, [0], num_inference_steps)
    return Statistics(collector.sigmas, "output", num_latents, rows, joint).sampler


def _resumed(path: Path | None, job: Job, setting: str) -> Statistics | None:
    """What an interrupted collection left; LesaError where it was of other prompts or settings."""
    if path is None or not os.path.lexists(path):
        return None
    found = Statistics.load(path)
    known = len(found.prompts)
    if found.setting != setting:
        raise _other(path, found.depends_on, job.depends_on())
    if found.prompts != list(job.prompts[:known]):
        raise _other(path, {"prompts": shown(found.prompts)}, {"prompts": shown(job.prompts)})
    if len(found.joint) != known * job.pictures:
        raise _other(path, {}, {})
    return found


def _other(path: Path, had: dict[str, str], has: dict[str, str]) -> LesaError:
    """What was collected before differs in these settings; older files do not name theirs."""
    names = [name for name in (*has, *had) if had.get(name) != has.get(name)] if had else []
    now = ", ".join(f"{name}={has.get(name)}" for name in dict.fromkeys(names))
    then = ", ".join(f"{name}={had.get(name)}" for name in dict.fromkeys(names))
    return LesaError(
        f"{now or 'folder=' + repr(str(path.parent))}: statistics file {path} was collected with "
        f"{then or 'other settings or another pipeline'}; delete it or choose another folder"
    )
