"""Run every method on the same prompts and seeds, and say how far from the plain run each ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from lesa.errors import LesaError
from lesa.evaluation.comparison import PLAIN, Comparison, Worst, attempted
from lesa.evaluation.contest import Contest
from lesa.evaluation.judges import Judge
from lesa.evaluation.method import Method
from lesa.evaluation.ranking import ours
from lesa.evaluation.runner import Chunk
from lesa.util.progress import Progress

__all__ = ["PLAIN", "Comparison", "Worst", "compare"]


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
    slow moment of the machine falls on all alike. A method that fails is dropped, and a note of the
    comparison says why. Prompt i is drawn with seed + i (its picture n
    of N with seed + i N + n).

    Args:
        settings: arguments of `pipe(...)`; num_inference_steps is needed. Where it holds
            `prompt_embeds`, one row per prompt, the prompts are titles.
        judges: what else the pictures are judged by (`lesa.evaluation.judges`); LPIPS is one of
            them where its package and weights are at hand.
        progress: where bars are shown; none by default.

    Raises: LesaError if there is no prompt or method, if every method failed, or batch_size is
        below 1.
    """
    _check(prompts, methods, settings, batch_size)
    contest = Contest.of(pipe, prompts, methods, settings, seed, judges)
    progress = progress or Progress(quiet=True)
    with progress.bar("count operations", len(methods) + 1) as contest.bar:
        contest.count_operations()  # which also warms the caches up
    batches = [*_batches(len(prompts), batch_size)]
    work = sum(method.full_steps for method in contest.methods.values())
    with progress.bar("compare", len(batches) * work) as contest.bar:
        for batch, rows in enumerate(batches):
            chunk = Chunk.of(prompts, settings, rows, seed, contest.each)
            kept = max(0, min(keep_pictures - contest.each * rows.start, len(chunk.titles)))
            plain = contest.reference_pass(chunk, kept)
            for method in _rotated(contest.contenders, batch):
                work_of = partial(contest.method_pass, method, chunk, plain, kept)
                contest.attempt(method, "while it was measured", work_of)
    result = contest.finish()
    own = ours(result.rows)
    with progress.bar("worst prompts", contest.worst_work(own)) as contest.bar:
        for row in own:
            what = f"the sheet of the worst prompts of {row['label']}"
            if (found := attempted(result, what, partial(contest.worst, row))) is not None:
                result.worst.append(found)
    return result


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
    if not all(isinstance(method, Method) for method in methods):
        raise LesaError(
            f"methods={methods!r}: names are not enough; give what lesa.evaluation.build_all makes"
        )
    if batch_size < 1:
        raise LesaError(f"batch_size={batch_size}: below 1; give at least 1")
    if "num_inference_steps" not in settings:
        raise LesaError(
            f"settings={dict(settings)!r}: num_inference_steps is missing; give the number of steps"
        )
    labels = [method.label for method in methods]
    if len(set(labels)) < len(labels):
        raise LesaError(f"methods={labels}: one is there twice; give each method once")
