"""Run every method on the same prompts and seeds, and say how far from the plain run each ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from lesa.errors import LesaError
from lesa.evaluation.comparison import PLAIN, Comparison, Worst
from lesa.evaluation.intervals import bootstrap, mean
from lesa.evaluation.judges import LPIPS, Judge, perceptual_distance
from lesa.evaluation.method import Method
from lesa.evaluation.metrics import lpips_is_missing
from lesa.evaluation.metrics_row import MetricsRow
from lesa.evaluation.ranking import Row, best_peer, ours, wanted
from lesa.evaluation.runner import Chunk, run_method, run_tflops
from lesa.evaluation.runs import Run, levels_of, step_flops
from lesa.hooks.prompt_inputs import pictures_per_prompt, settings_of
from lesa.util.progress import Bar, Progress

__all__ = ["PLAIN", "Comparison", "Worst", "compare"]

WORST = 4  # prompts that are shown where lesa is worst


def compare(
    pipe: Any,
    prompts: Sequence[str],
    methods: Sequence[Method],
    settings: Mapping[str, Any],
    *,
    seed: int = 0,
    batch_size: int = 8,
    keep_pictures: int = 8,
    judges: Sequence[Judge] = (),
    progress: Progress | None = None,
) -> Comparison:
    """Compare methods with the plain pipeline on the same prompts, seeds and settings.

    The plain run is made once per batch, each method right after it, in rotating order, so that a
    slow moment of the machine falls on all alike. Prompt i is drawn with seed + i (its picture n
    of N with seed + i N + n).

    Args:
        settings: arguments of `pipe(...)`; num_inference_steps is needed. Where it holds
            `prompt_embeds`, one row per prompt, the prompts are titles.
        judges: what else the pictures are judged by (`lesa.evaluation.judges`); LPIPS is one of
            them where its package and weights are at hand.
        progress: where bars are shown; none by default.

    Raises: LesaError if there is no prompt or method, or batch_size is below 1.
    """
    _check(prompts, methods, settings, batch_size)
    contest = _Contest.of(pipe, prompts, methods, settings, seed, judges)
    progress = progress or Progress(quiet=True)
    with progress.bar("count operations", len(methods) + 1) as contest.bar:
        _count_operations(contest)  # which also warms the caches up
    batches = [*_batches(len(prompts), batch_size)]
    work = sum(method.full_steps for method in contest.methods.values())
    with progress.bar("compare", len(batches) * work) as contest.bar:
        for batch, rows in enumerate(batches):
            chunk = Chunk.of(prompts, settings, rows, seed, contest.each)
            kept = max(0, min(keep_pictures - contest.each * rows.start, len(chunk.titles)))
            plain = _reference_pass(contest, chunk, kept)
            for method in _rotated(methods, batch):
                _method_pass(contest, method, chunk, plain, kept)
    result = _finish(contest)
    with progress.bar("worst prompts", 0) as contest.bar:
        result.worst = [_worst(contest, row) for row in ours(result.rows)]
    return result


@dataclass
class _Contest:
    """What the passes of a comparison share.

    Attributes:
        result: What is filled in on the way.
        methods: By label, the plain run under `PLAIN`.
        measured: What was measured of each so far, by label.
        each: Pictures per prompt.
        bar: Of what goes on.
    """

    pipe: Any
    result: Comparison
    methods: dict[str, Method]
    judges: Sequence[Judge]
    each: int
    measured: dict[str, MetricsRow] = field(init=False)
    bar: Bar = field(init=False)

    def __post_init__(self) -> None:
        self.measured = {label: MetricsRow() for label in self.methods}

    @classmethod
    def of(
        cls,
        pipe: Any,
        prompts: Sequence[str],
        methods: Sequence[Method],
        settings: Mapping[str, Any],
        seed: int,
        judges: Sequence[Judge],
    ) -> _Contest:
        result, each = (
            Comparison([*prompts], {**settings}, seed=seed),
            pictures_per_prompt(settings),
        )
        result.titles = [prompt for prompt in prompts for _ in range(each)]
        reason = lpips_is_missing()
        if reason is None:
            judges = (*judges, perceptual_distance)
        else:
            result.notes.append(f"LPIPS was not measured: {reason}")
        plain = Method(PLAIN, settings["num_inference_steps"])
        named = {PLAIN: plain, **{method.label: method for method in methods}}
        return cls(pipe, result, named, judges, each)

    @property
    def contenders(self) -> list[Method]:
        """All methods but the plain run."""
        return [method for label, method in self.methods.items() if label != PLAIN]

    def run(self, label: str, chunk: Chunk, measured: MetricsRow) -> Run:
        """One batch of a method; the bar moves by its full steps, as if they were spread evenly."""
        method, bar = self.methods[label], self.bar
        loops = len(chunk.prompts) if method.one_by_one else 1
        share, bar.label = method.full_steps / method.num_steps / loops, label
        return run_method(self.pipe, method, chunk, measured, lambda: bar.advance(share))


def _count_operations(contest: _Contest) -> None:
    """TFLOP of one prompt's loop, plain and by every method."""
    result = contest.result
    first = settings_of(result.settings, [0], len(result.prompts))
    full = step_flops(contest.pipe, result.prompts[0], first, 1)[0]
    result.plain_tflops = full * result.settings["num_inference_steps"] / 1e12
    for method in contest.contenders:
        contest.bar.advance(1, method.label)
        contest.measured[method.label].tflops = run_tflops(
            contest.pipe, result.prompts[0], method, first, full
        )


def _reference_pass(contest: _Contest, chunk: Chunk, kept: int) -> Run:
    """The plain run of a batch, which every method is compared with."""
    measured = contest.measured[PLAIN]
    plain = contest.run(PLAIN, chunk, measured)
    measured.seconds.append(plain.seconds)
    contest.result.noise_levels = levels_of(contest.pipe, contest.methods[PLAIN].num_steps)
    measured.judge(contest.judges, plain, plain, chunk.titles)
    measured.pictures.append(plain.images[:kept])
    return plain


def _method_pass(contest: _Contest, method: Method, chunk: Chunk, plain: Run, kept: int) -> None:
    """One method's run of a batch, measured against the plain one."""
    measured = contest.measured[method.label]
    run = contest.run(method.label, chunk, measured)
    measured.add(plain, run)
    measured.judge(contest.judges, plain, run, chunk.titles)
    measured.pictures.append(run.images[:kept])


def _finish(contest: _Contest) -> Comparison:
    """The rows, once all batches are through, and the prompts on which lesa is worst."""
    result, plain = contest.result, contest.measured[PLAIN]
    result.plain_seconds = median(plain.seconds)
    result.pictures[PLAIN] = torch.cat(plain.pictures)
    if plain.peak_bytes is not None:
        result.plain_more["peak_bytes"] = plain.peak_bytes
    judged = {name: values for name, values in plain.judged.items() if name != LPIPS}
    if judged:
        result.plain_more["scores"] = {
            name: bootstrap(mean, values) for name, values in judged.items()
        }
    for method in contest.contenders:
        measured = contest.measured[method.label]
        result.rows.append(measured.row(method, plain))
        result.pictures[method.label] = torch.cat(measured.pictures)
        if measured.errors:
            result.curves[method.label] = torch.cat(measured.errors).mean(0).tolist()
        for reason, count in measured.fallbacks.items():
            result.notes.append(f"{method.label}: {count} more steps ran in full ({reason})")
    return result


def _worst(contest: _Contest, row: Row) -> Worst:
    """The pictures are made again, since nobody knew before the end which ones to keep."""
    result, each = contest.result, contest.each
    hardest = sorted(range(len(row["psnr"])), key=row["psnr"].__getitem__)
    prompts = list(dict.fromkeys(picture // each for picture in hardest))[:WORST]
    chunk = Chunk.of(result.prompts, result.settings, prompts, result.seed, each)
    peer = best_peer(result.rows, wanted(row))
    shown = [row, *([peer] if peer else [])]
    pictures = [each * prompt + n for prompt in prompts for n in range(each)]
    decibels = {r["label"]: [r["psnr"][picture] for picture in pictures] for r in shown}
    made = {label: contest.run(label, chunk, MetricsRow()).images for label in (PLAIN, *decibels)}
    return Worst(row["label"], chunk.titles, decibels, made)


def _batches(count: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def _rotated(methods: Sequence[Method], by: int) -> list[Method]:
    by %= len(methods)
    return [*methods[by:], *methods[:by]]


def _check(
    prompts: Sequence[str], methods: Sequence[Method], settings: Mapping[str, Any], batch_size: int
) -> None:
    if not prompts:
        raise LesaError("prompts=[]: the list is empty; give at least one prompt")
    if not methods:
        raise LesaError("methods=[]: the list is empty; give at least one")
    if batch_size < 1:
        raise LesaError(f"batch_size={batch_size}: below 1; give at least 1")
    if "num_inference_steps" not in settings:
        raise LesaError(
            f"settings={dict(settings)!r}: num_inference_steps is missing; give the number of steps"
        )
    labels = [method.label for method in methods]
    if len(set(labels)) < len(labels):
        raise LesaError(f"methods={labels}: one is there twice; give each method once")
