"""Run every method on the same prompts and seeds, and say how far from the plain run each ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lesa.errors import LesaError
from lesa.evaluation.intervals import bootstrap, mean
from lesa.evaluation.judges import Judge, perceptual_distance
from lesa.evaluation.method import Method
from lesa.evaluation.metrics import lpips_is_missing
from lesa.evaluation.metrics_row import MetricsRow
from lesa.evaluation.ranking import best_peer, ours, wanted
from lesa.evaluation.runner import Chunk, run_method, run_tflops
from lesa.evaluation.runs import step_flops
from lesa.hooks.prompt_inputs import pictures_per_prompt, settings_of

PLAIN = "plain"
WORST = 4  # prompts that are shown where lesa is worst


@dataclass
class Worst:
    """The prompts on which one of lesa's rows is worst, plain, by lesa and by the best peer.

    decibels: label -> PSNR of each. pictures: label (and "plain") -> [n, C, H, W], or videos.
    """

    label: str
    prompts: list[str]
    decibels: dict[str, list[float]]
    pictures: dict[str, Tensor]


@dataclass
class Comparison:
    """What `compare` measured.

    rows: one dict per method, with the keys `COLUMNS`, for videos also `VIDEO_COLUMNS`; decibels
        against the plain run's pictures (psnr lists them, psnr_mean is their mean, psnr_p10 their
        10th percentile, each with a 95 % bootstrap interval; psnr_frame_* are over frames,
        temporal_psnr is of the differences between frames), seconds of the denoising loop for one
        batch, speedup over the plain loop in the same round, tflops of one prompt's loop,
        cache_bytes held during a batch. Where they apply: peak_bytes that CUDA allocated on top
        during a batch, scores of the judges, psnr_u8wrap of the paper's own recipe.
    curves: label -> relative RMS error of the latent after each step, mean over prompts.
    pictures: label (and "plain") -> the first pictures, [n, C, H, W] in [0, 1], or videos,
        [n, F, C, H, W]; `titles` are the prompts of all pictures.
    worst: the prompts on which each of lesa's rows is worst.
    notes: steps that a cache had to run in full, by reason, and what could not be measured.
    """

    prompts: list[str]
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    pictures: dict[str, Tensor] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    worst: list[Worst] = field(default_factory=list)
    seed: int = 0
    plain_seconds: float = 0.0
    plain_tflops: float = 0.0
    plain_more: dict[str, Any] = field(default_factory=dict)  # peak_bytes, scores

    def scores(self) -> dict[str, dict[str, float]]:
        """Label (and "plain") -> name -> mean of what a judge said, where one was asked."""
        judged = {PLAIN: self.plain_more, **{row["label"]: row for row in self.rows}}
        return {
            label: {name: found["value"] for name, found in part["scores"].items()}
            for label, part in judged.items()
            if "scores" in part
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures."""
        return {
            "settings": self.settings,
            "seed": self.seed,
            "prompts": self.prompts,
            "plain": {
                "seconds": self.plain_seconds,
                "tflops": self.plain_tflops,
                **self.plain_more,
            },
            "rows": self.rows,
            "error_per_step": self.curves,
            "notes": self.notes,
        }


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
    advance: Callable[[str], object] = lambda label: None,
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
        advance: told the label of every run that has ended.

    Raises: LesaError if there is no prompt or method, or batch_size is below 1.
    """
    _check(prompts, methods, settings, batch_size)
    tallies = {method.label: MetricsRow() for method in methods}
    result = Comparison(list(prompts), dict(settings), seed=seed)
    judges = _with_lpips(judges, result)
    reference, base = Method(PLAIN, settings["num_inference_steps"]), MetricsRow()
    each = pictures_per_prompt(settings)
    result.titles = [prompt for prompt in prompts for _ in range(each)]
    first = settings_of(settings, [0], len(prompts))
    full = step_flops(pipe, prompts[0], first, 1)[0]
    result.plain_tflops = full * settings["num_inference_steps"] / 1e12
    for method in methods:  # which also warms the caches up
        tallies[method.label].tflops = run_tflops(pipe, prompts[0], method, first, full)
    for batch, start in enumerate(range(0, len(prompts), batch_size)):
        rows = range(start, min(start + batch_size, len(prompts)))
        chunk = Chunk.of(prompts, settings, rows, seed, each)
        kept = max(0, min(keep_pictures - each * start, len(chunk.titles)))
        plain = run_method(pipe, reference, chunk, base)
        base.seconds.append(plain.seconds)
        base.judge(judges, plain, plain, chunk.titles)
        base.pictures.append(plain.images[:kept])
        advance(PLAIN)
        for method in _rotated(methods, batch):
            measured = tallies[method.label]
            run = run_method(pipe, method, chunk, measured)
            measured.add(plain, run)
            measured.judge(judges, plain, run, chunk.titles)
            measured.pictures.append(run.images[:kept])
            advance(method.label)
    _collect(result, methods, tallies, base)
    _show_worst(pipe, result, {PLAIN: reference, **{m.label: m for m in methods}}, seed, each)
    return result


def _with_lpips(judges: Sequence[Judge], result: Comparison) -> Sequence[Judge]:
    reason = lpips_is_missing()
    if reason is None:
        return (*judges, perceptual_distance)
    result.notes.append(f"LPIPS was not measured: {reason}")
    return judges


def _collect(
    result: Comparison, methods: Sequence[Method], tallies: dict[str, MetricsRow], base: MetricsRow
) -> None:
    result.plain_seconds = median(base.seconds)
    result.pictures[PLAIN] = torch.cat(base.pictures)
    if base.peak_bytes is not None:
        result.plain_more["peak_bytes"] = base.peak_bytes
    if base.judged:
        result.plain_more["scores"] = {
            name: bootstrap(mean, values) for name, values in base.judged.items()
        }
    for method in methods:
        measured = tallies[method.label]
        result.rows.append(measured.row(method, base))
        result.pictures[method.label] = torch.cat(measured.pictures)
        if measured.errors:
            result.curves[method.label] = torch.cat(measured.errors).mean(0).tolist()
        for reason, count in measured.fallbacks.items():
            result.notes.append(f"{method.label}: {count} more steps ran in full ({reason})")


def _show_worst(
    pipe: Any, result: Comparison, methods: Mapping[str, Method], seed: int, each: int
) -> None:
    """Make the pictures again, since nobody knew before the end which ones to keep."""
    for row in ours(result.rows):
        hardest = sorted(range(len(row["psnr"])), key=row["psnr"].__getitem__)
        prompts = list(dict.fromkeys(picture // each for picture in hardest))[:WORST]
        chunk = Chunk.of(result.prompts, result.settings, prompts, seed, each)
        peer = best_peer(result.rows, wanted(row))
        shown = [row, *([peer] if peer else [])]
        pictures = [each * prompt + n for prompt in prompts for n in range(each)]
        result.worst.append(
            Worst(
                row["label"],
                chunk.titles,
                {r["label"]: [r["psnr"][picture] for picture in pictures] for r in shown},
                {
                    label: run_method(pipe, methods[label], chunk, MetricsRow()).images
                    for label in (PLAIN, *(r["label"] for r in shown))
                },
            )
        )


def _rotated(methods: Sequence[Method], by: int) -> list[Method]:
    by %= len(methods)
    return [*methods[by:], *methods[:by]]


def _check(
    prompts: Sequence[str], methods: Sequence[Method], settings: Mapping[str, Any], batch_size: int
) -> None:
    if not prompts:
        raise LesaError("prompts: the list is empty; give at least one prompt")
    if not methods:
        raise LesaError("methods: the list is empty; give at least one")
    if batch_size < 1:
        raise LesaError(f"batch_size: {batch_size} is below 1; give at least 1")
    if "num_inference_steps" not in settings:
        raise LesaError("settings: num_inference_steps is missing; give the number of steps")
    labels = [method.label for method in methods]
    if len(set(labels)) < len(labels):
        raise LesaError(f"methods: {labels} holds one twice; give each method once")
