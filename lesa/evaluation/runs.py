"""Timed runs (see `lesa.hooks.timed_run`), their noise levels, the operations of single steps."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lesa.hooks.noise_levels import noise_levels
from lesa.hooks.prompt_inputs import pictures_per_prompt, prompt_arguments
from lesa.hooks.timed_run import LoopBar, Run, generate, generators, loop_bar

__all__ = ["LoopBar", "Run", "generate", "generators", "levels_of", "loop_bar", "step_flops"]


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of the operator behind attention on the CPU, which torch's counter does not know."""
    return sdpa_flop_count(query, key, value)


_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def levels_of(pipe: Any, num_steps: int) -> list[float]:
    """Noise levels of the run that has just ended, before each step and after the last one; none
    where its scheduler has none."""
    scheduler = getattr(pipe, "scheduler", None)
    first = getattr(scheduler, "begin_index", None) or 0
    return [*(noise_levels(scheduler, first, num_steps) or ())]


class _Enough(Exception):
    """Ends a probing run from inside its loop."""


def step_flops(pipe: Any, prompt: str, settings: Mapping[str, Any], steps: int) -> list[int]:
    """Floating-point operations of the first `steps` steps for one prompt, then stop.

    Matrix products, convolutions and attention, as torch's own counter sees them; text encoders
    and decoder are outside the loop and left out.
    """
    marks: list[int] = []
    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION)

    def mark() -> None:
        marks.append(counter.get_total_flops())
        if len(marks) > steps:
            raise _Enough

    own = prompt_arguments([prompt], settings, [0])
    seeds = range(pictures_per_prompt(settings))
    arguments = {"output_type": "latent", **own, "generator": generators(seeds)}
    with torch.no_grad(), loop_bar(pipe, mark), suppress(_Enough), counter:
        pipe(**arguments)
    return [after - before for before, after in zip(marks, marks[1:], strict=False)]
