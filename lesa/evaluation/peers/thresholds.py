"""The threshold at which an adaptive method spends a wanted number of full steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from statistics import fmean
from typing import Any

from lesa.errors import LesaError
from lesa.evaluation.method import Bench, Method, Use
from lesa.evaluation.runs import generate
from lesa.hooks.prompt_inputs import pictures_per_prompt, settings_of

Applied = Callable[[Any], AbstractContextManager[Use]]

PROMPTS = 4  # of the calibration ones: every round runs each of them once
HALVINGS = 10  # after the bracket is found: 0.1 % of it


def needs_calibration(bench: Bench) -> str | None:
    """Why a method that is prepared on prompts cannot run on this bench, or None."""
    return None if bench.calibration else "needs calibration prompts; give --calibration FILE"


def threshold_for(wanted: int, bench: Bench, applied: Callable[[float], Applied]) -> float:
    """The threshold with the fewest full steps, in the mean, that are not below `wanted`.

    applied: threshold -> pipeline -> context manager that yields a `Use` with `full_steps`. A
    larger threshold must spend fewer full steps, and 0 as many as the method can. The count is
    measured on the first calibration prompts, one by one, each drawn with the seed that a
    comparison gives it; doubling from 1 brackets the threshold, bisection narrows it.

    Raises: LesaError where the bench has no calibration prompts.
    """
    if (reason := needs_calibration(bench)) is not None:
        raise LesaError(f"calibration: an adaptive method {reason}")
    best, fewest = 0.0, float(bench.num_steps)
    low, high, bracketed = 0.0, 1.0, False
    rounds = 0
    while fewest > wanted and rounds < HALVINGS:
        tried = (low + high) / 2 if bracketed else high
        count = mean_full_steps(bench, applied(tried))
        if count < wanted:
            high, bracketed = tried, True
        else:
            low, high = tried, high if bracketed else 2 * tried
            if (count, -tried) < (fewest, -best):
                best, fewest = tried, count
        rounds += 1
    return best


def mean_full_steps(bench: Bench, applied: Applied) -> float:
    """How many steps a method runs in full, counted: the mean over a few calibration prompts."""
    settings = {**bench.settings, "num_inference_steps": bench.num_steps, "output_type": "latent"}
    each = pictures_per_prompt(settings)
    counts = []
    for row, prompt in enumerate(bench.calibration[:PROMPTS]):
        own = settings_of(settings, [row], len(bench.calibration))
        seeds = range(bench.seed + each * row, bench.seed + each * (row + 1))
        with applied(bench.pipe) as use:
            if use.full_steps is None:
                raise LesaError("full_steps: the method does not count them; give Use a counter")
            generate(bench.pipe, [prompt], seeds, own)
            counts.append(use.full_steps())
    return fmean(counts)


def adaptive(
    name: str, wanted: int, bench: Bench, applied: Callable[[float], Applied], note: str = ""
) -> Method:
    """A method of the largest threshold that spends `wanted` full steps or more."""
    threshold = threshold_for(wanted, bench, applied)
    note = f"{note}threshold {threshold:.3g} for {wanted} steps"
    return Method(
        name,
        bench.num_steps,
        applied=applied(threshold),
        wanted=wanted,
        one_by_one=True,
        note=note,
    )
