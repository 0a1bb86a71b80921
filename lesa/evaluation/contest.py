"""A comparison while it goes on: what was measured of every method so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lesa.evaluation.comparison import PLAIN, Comparison, Worst
from lesa.evaluation.failures import Failures
from lesa.evaluation.intervals import bootstrap, mean
from lesa.evaluation.judges import LPIPS, Judge, perceptual_distance
from lesa.evaluation.method import Method
from lesa.evaluation.metrics_row import MetricsRow
from lesa.evaluation.ranking import Row, best_peer, wanted
from lesa.evaluation.runner import Chunk, run_method, run_tflops
from lesa.evaluation.runs import Run, levels_of, step_flops
from lesa.hooks.prompt_inputs import pictures_per_prompt, settings_of
from lesa.util.perceptual import lpips_is_missing
from lesa.util.progress import Bar

WORST = 4  # prompts that are shown where lesa is worst


@dataclass
class Contest:
    """What the passes of a comparison share.

    Attributes:
        result: What is filled in on the way.
        methods: By label, the plain run under `PLAIN`.
        measured: What was measured of each so far, by label.
        each: Pictures per prompt.
        failures: Why methods were dropped on the way.
        bar: Of what goes on.
    """

    pipe: Any
    result: Comparison
    methods: dict[str, Method]
    judges: Sequence[Judge]
    each: int
    failures: Failures = field(default_factory=Failures)
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
    ) -> Contest:
        result, each = (
            Comparison([*prompts], {**settings}, seed=seed),
            pictures_per_prompt(settings),
        )
        result.titles = [prompt for prompt in prompts for _ in range(each)]
        plain = Method(PLAIN, settings["num_inference_steps"])
        named = {PLAIN: plain, **{method.label: method for method in methods}}
        return cls(pipe, result, named, judges, each)

    @property
    def contenders(self) -> list[Method]:
        """All methods but the plain run."""
        return [method for label, method in self.methods.items() if label != PLAIN]

    def attempt(self, method: Method, where: str, act: Callable[[], object]) -> None:
        """Do a part of a method's work; where it fails, the contest goes on without the method.

        Raises: LesaError if it was the last one.
        """
        self.failures.attempt(method.label, where, act)
        if method.label in self.failures.reasons:
            del self.methods[method.label]
            if not self.contenders:
                raise self.failures.nothing_left()

    def run(self, label: str, chunk: Chunk, measured: MetricsRow) -> Run:
        """One batch of a method; the bar moves by its full steps, as if they were spread evenly."""
        method, bar = self.methods[label], self.bar
        loops = len(chunk.prompts) if method.one_by_one else 1
        share, bar.label = method.full_steps / method.num_steps / loops, label
        return run_method(self.pipe, method, chunk, measured, lambda: bar.advance(share))

    def count_operations(self) -> None:
        """TFLOP of one prompt's loop, plain and by every method."""
        result = self.result
        first = settings_of(result.settings, [0], len(result.prompts))
        full = step_flops(self.pipe, result.prompts[0], first, 1)[0]
        result.plain_tflops = full * result.settings["num_inference_steps"] / 1e12
        for method in self.contenders:
            self.bar.advance(1, method.label)
            self.attempt(
                method,
                "while its operations were counted",
                partial(self._count, method, first, full),
            )

    def _count(self, method: Method, first: Mapping[str, Any], full: int) -> None:
        prompt, measured = self.result.prompts[0], self.measured[method.label]
        measured.tflops = run_tflops(self.pipe, prompt, method, first, full)

    def reference_pass(self, chunk: Chunk, kept: int) -> Run:
        """The plain run of a batch, which every method is compared with."""
        measured = self.measured[PLAIN]
        plain = self.run(PLAIN, chunk, measured)
        if not measured.seconds:  # the first batch tells how large the pictures are
            self._judge_by_lpips(plain.images)
        measured.seconds.append(plain.seconds)
        measured.cpu_seconds.append(plain.cpu_seconds)
        self.result.noise_levels = levels_of(self.pipe, self.methods[PLAIN].num_steps)
        measured.judge(self.judges, plain, plain, chunk.titles)
        measured.pictures.append(plain.images[:kept])
        return plain

    def _judge_by_lpips(self, pictures: Tensor) -> None:
        reason = lpips_is_missing(pictures)
        if reason is None:
            self.judges = (*self.judges, perceptual_distance)
        else:
            self.result.lpips_missing = reason
            self.result.notes.append(f"LPIPS was not measured: {reason}")

    def method_pass(self, method: Method, chunk: Chunk, plain: Run, kept: int) -> None:
        """One method's run of a batch, measured against the plain one."""
        measured = self.measured[method.label]
        run = self.run(method.label, chunk, measured)
        measured.add(plain, run)
        measured.judge(self.judges, plain, run, chunk.titles)
        measured.pictures.append(run.images[:kept])

    def finish(self) -> Comparison:
        """The rows, once all batches are through."""
        result, plain = self.result, self.measured[PLAIN]
        result.plain_seconds = median(plain.seconds)
        result.plain_more["cpu_seconds"] = median(plain.cpu_seconds)
        result.pictures[PLAIN] = torch.cat(plain.pictures)
        if plain.peak_bytes is not None:
            result.plain_more["peak_bytes"] = plain.peak_bytes
        judged = {name: values for name, values in plain.judged.items() if name != LPIPS}
        if judged:
            result.plain_more["scores"] = {
                name: bootstrap(mean, values) for name, values in judged.items()
            }
        for method in self.contenders:
            measured = self.measured[method.label]
            result.rows.append(measured.row(method, plain))
            result.pictures[method.label] = torch.cat(measured.pictures)
            if measured.errors:
                result.curves[method.label] = torch.cat(measured.errors).mean(0).tolist()
            for reason, count in measured.fallbacks.items():
                result.notes.append(f"{method.label}: {count} more steps ran in full ({reason})")
        result.notes += self.failures.notes()
        return result

    def _beside(self, row: Row) -> list[Row]:
        """A row of lesa's, and the best peer's, if there is one."""
        peer = best_peer(self.result.rows, wanted(row))
        return [row, *([peer] if peer else [])]

    def worst_work(self, rows: Sequence[Row]) -> int:
        """Full steps of all that `worst` runs for these rows."""
        labels = [
            label for row in rows for label in (PLAIN, *(r["label"] for r in self._beside(row)))
        ]
        return sum(self.methods[label].full_steps for label in labels)

    def worst(self, row: Row) -> Worst:
        """The pictures are made again, since nobody knew before the end which ones to keep."""
        result, each = self.result, self.each
        hardest = sorted(range(len(row["psnr"])), key=row["psnr"].__getitem__)
        prompts = list(dict.fromkeys(picture // each for picture in hardest))[:WORST]
        chunk = Chunk.of(result.prompts, result.settings, prompts, result.seed, each)
        shown = self._beside(row)
        pictures = [each * prompt + n for prompt in prompts for n in range(each)]
        decibels = {r["label"]: [r["psnr"][picture] for picture in pictures] for r in shown}
        made = {label: self.run(label, chunk, MetricsRow()).images for label in (PLAIN, *decibels)}
        return Worst(row["label"], chunk.titles, decibels, made)
