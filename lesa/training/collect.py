"""Phase 1: run the plain pipeline on the calibration prompts and keep inner products only."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lesa.core.checks import shown
from lesa.errors import LesaError
from lesa.training.collector import Collector, Trajectories
from lesa.training.job import Job, in_batches
from lesa.training.sampler import Sampler
from lesa.training.statistics import Statistics


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
    job.work.plain += job.rows(found.num_steps)
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
            if path is not None and ranks.leads and any(batch[0] >= known for batch in together):
                found.save(path)
    assert found is not None
    base.finish(ranks)
    job.work.bases[found.num_steps] = base  # fewer than asked for, where a run begins late
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
