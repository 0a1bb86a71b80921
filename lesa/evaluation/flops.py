"""What acceleration costs on the published models: counted on the meta device, nothing is run.

A run of S steps with A of them full costs A * full + (S - A) * skipped operations, summed over the
guidance branches. torch's counter sees matrix products, convolutions and attention (4 L^2 d
operations per head of d channels, also where a kernel would fuse it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lesa.core.checks import MOST_STEPS, whole
from lesa.core.forecaster import Tap
from lesa.core.schedule import check_count
from lesa.engine.ring import Ring
from lesa.engine.tail import ModulatedTail
from lesa.errors import LesaError
from lesa.evaluation.full_size import MODELS, FullSize, Size
from lesa.hooks.attach import attach, detach
from lesa.hooks.denoiser import Denoiser, Run
from lesa.hooks.outputs import read_sample

Result = TypeVar("Result")
HISTORY = 3
TAPS: tuple[Tap, ...] = ("output", "hidden")


@dataclass(frozen=True)
class StepCost:
    """One step of all guidance branches.

    full, skipped: floating-point operations, the latter by tap. cache_bytes: rings of K = 3 in
    bfloat16, by tap. adapter: what an unfused low-rank adapter adds to a full step.
    """

    full: int
    skipped: dict[Tap, int]
    cache_bytes: dict[Tap, int]
    adapter: int = 0


def flops_rows(
    model: str,
    *,
    full_steps: Sequence[int] | None = None,
    num_steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
) -> list[dict[str, Any]]:
    """The plain run, then every number of full steps with either tap; tflops in 10^12 operations.

    What is not given is as in the paper. `paper_tflops` is the paper's number (arXiv 2602.20497,
    tables 1 to 3, 5 and 6) where it reports this very run, else None; `deviation` is
    tflops / paper_tflops - 1. Where the paper's run carries an unfused adapter, the same two
    with it are `tflops_adapter` and `deviation_adapter`.

    Raises: LesaError for an unknown model, an impossible size, or an impossible count.
    """
    row = published(model)
    size = row.size.changed(height, width, frames)
    steps = row.num_steps if num_steps is None else num_steps
    whole("num-inference-steps", steps, 1, MOST_STEPS)
    default = [count for count in row.full_steps if count < steps] or [max(1, steps // 5)]
    counts = default if full_steps is None else list(full_steps)
    for count in counts:
        check_count(count, steps, "full-steps")
    cost = step_cost(row, size)
    paper = row.paper if (size, steps) == (row.size, row.num_steps) else {}
    shared = {
        "model": model,
        "tokens": [size.tokens, *row.text],
        "branches": row.batch * len(row.text),
        "num_steps": steps,
        "tflops_full_step": cost.full / 1e12,
    }
    wanted = [(None, steps), *((tap, count) for count in counts for tap in TAPS)]
    return [shared | _row(cost, steps, count, tap, paper.get(count)) for tap, count in wanted]


def _row(
    cost: StepCost, steps: int, count: int, tap: Tap | None, paper: float | None
) -> dict[str, Any]:
    """A run of `steps` steps with `count` of them full, beside the paper's number of it."""
    skipped = cost.skipped[tap] if tap else 0
    total = (count * cost.full + (steps - count) * skipped) / 1e12
    found = {
        "tap": tap,
        "full_steps": count,
        "tflops_skipped_step": skipped / 1e12 if tap else None,
        "tflops": total,
        "speedup": steps * cost.full / 1e12 / total,
        "cache_bytes": cost.cache_bytes[tap] if tap else 0,
        "paper_tflops": paper,
        "deviation": _deviation(total, paper),
    }
    if cost.adapter:
        with_adapter = total + count * cost.adapter / 1e12
        found["tflops_adapter"] = with_adapter
        found["deviation_adapter"] = _deviation(with_adapter, paper)
    return found


def published(model: str) -> FullSize:
    """The published model of this name; LesaError if it is unknown."""
    if model not in MODELS:
        raise LesaError(
            f"model={model!r}: it has no published sizes; choose from {', '.join(MODELS)}"
        )
    return MODELS[model]


def step_cost(row: FullSize, size: Size) -> StepCost:
    """Count one full and one skipped step of a published model at a size.

    All blocks of one container cost the same: one of each is built, counted, and multiplied.
    """
    numbers = {blocks: row.config[field] for blocks, field in row.layers.items()}
    model = row.build()
    parts = []
    for text in row.text:
        parts.append(call_cost(model, row.arguments(size, text), numbers, row.adapter_rank))
    return StepCost(
        sum(part.full for part in parts),
        {tap: sum(part.skipped[tap] for part in parts) for tap in TAPS},
        {tap: sum(part.cache_bytes[tap] for part in parts) for tap in TAPS},
        sum(part.adapter for part in parts),
    )


def call_cost(
    model: nn.Module, arguments: dict[str, Any], numbers: Mapping[str, int], adapter_rank: int = 0
) -> StepCost:
    """Count one call of a denoiser that was built with one block per container.

    The output tap skips everything but the mix; the hidden one leaves the tail, alone where lesa
    runs it alone, else inside the model's forward without its blocks.

    Args:
        numbers: how many blocks each container has in truth.
        adapter_rank: r of x -> W x + B A x on every linear layer of the blocks; 0 for none.
    """
    denoiser = attach(model, lambda denoiser, args, kwargs: denoiser.run(args, kwargs).output)
    with _adapter_sizes(model, numbers) as sizes:
        full, run = _count(lambda: denoiser.run((), arguments, tap=True), model, numbers)
    tail = _tail_flops(denoiser, run, arguments)
    detach(model)
    kept: dict[Tap, tuple[Tensor | None, int]] = {
        "output": (read_sample(run.output), 0),
        "hidden": (run.feature, tail),
    }
    skipped, cache_bytes = {}, {}
    for tap, (feature, modules) in kept.items():
        assert feature is not None  # every published model has both taps
        regressors = HISTORY + (tap == "output")  # which also weighs the current latent
        skipped[tap] = modules + 2 * regressors * feature.numel()
        cache_bytes[tap] = Ring(HISTORY, feature.bfloat16()).nbytes
    return StepCost(full, skipped, cache_bytes, 2 * adapter_rank * sum(sizes))


def _tail_flops(denoiser: Denoiser, run: Run, arguments: dict[str, Any]) -> int:
    """The modules of a skipped step of the hidden tap."""
    feature, embedded = run.feature, run.embedded
    assert feature is not None
    tail = ModulatedTail.of(denoiser)
    if tail is None or embedded is None:
        return _count(lambda: denoiser.run_tail(feature, (), arguments), denoiser.model)[0]
    norm, projection, embedding = tail.norm, tail.projection, tail.embedding
    return _count(lambda: projection(norm(feature, embedding(*embedded))), denoiser.model)[0]


def _count(
    call: Callable[[], Result], model: nn.Module, numbers: Mapping[str, int] | None = None
) -> tuple[int, Result]:
    """Operations of a call, with the one block of each container counted as often as there are."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.device("meta"), counter:
        result = call()
    found, root = counter.get_flop_counts(), type(model).__name__
    total = counter.get_total_flops()
    for blocks, number in (numbers or {}).items():
        total += (number - 1) * sum(found[f"{root}.{blocks}.0"].values())
    return total, result


@contextmanager
def _adapter_sizes(model: nn.Module, numbers: Mapping[str, int]) -> Iterator[list[int]]:
    """For every call of a linear layer of the blocks: rows (in + out), over all blocks."""
    sizes: list[int] = []

    def noted(number: int, layer: Any, args: tuple[Tensor, ...], _: Tensor) -> None:
        rows = args[0].numel() // layer.in_features
        sizes.append(number * rows * (layer.in_features + layer.out_features))

    hooks = [
        layer.register_forward_hook(partial(noted, number))
        for blocks, number in numbers.items()
        for layer in model.get_submodule(blocks).modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


def _deviation(tflops: float, paper: float | None) -> float | None:
    return None if paper is None else tflops / paper - 1
