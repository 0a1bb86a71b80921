"""A forecaster that a peer trains for itself."""

from __future__ import annotations

from typing import Any

from lesa.evaluation.method import Bench
from lesa.forecasters.lesa import LesaForecaster
from lesa.training.train import train

__all__ = ["trained"]


def trained(bench: Bench, full_steps: int, **options: Any) -> LesaForecaster:
    """One for a number of full steps, trained on the bench's calibration prompts.

    Raises: KeyboardInterrupt where an interrupt ended the training early: what was found by then
        is no method to measure.
    """
    found = train(
        bench.pipe,
        bench.calibration,
        bench.num_steps,
        full_steps,
        seed=bench.seed,
        call=bench.settings,
        progress=False,
        **options,
    )
    if found.metadata.get("interrupted"):
        raise KeyboardInterrupt
    return found
