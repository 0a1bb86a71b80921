"""What a run has that a forecaster was not trained for, in one sentence with the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lesa.core.schedule import Schedule
from lesa.forecasters.calibration import SIGMA_TOLERANCE, Calibration


class Mismatch(NamedTuple):
    """kind: "noise", "steps", "levels" or "list"; told: the sentence."""

    kind: str
    told: str


def mismatch(
    calibrations: Sequence[Calibration],
    trained: str,
    schedule: Schedule,
    sigmas: Sequence[float],
    sampler: str,
    noise: bool,
) -> Mismatch | None:
    """How a run differs from all calibrations, None where it does not, or nothing is forecast.

    Args:
        calibrations: of the forecaster.
        trained: the class of the scheduler that it was trained with, or "".
        schedule: of the run, bound.
        sigmas: its S + 1 noise levels.
        sampler: the class of its scheduler, or "".
        noise: whether that one adds noise, and the trained one did not.
    """
    if not calibrations or not schedule.skipped_steps:
        return None
    steps, count = schedule.steps, len(schedule.full_steps)
    trained, sampler = trained or "another scheduler", sampler or "this scheduler"
    if noise:
        kind = "noise"
        told = (
            f"{sampler}: it adds noise, and {trained}, which the forecaster was trained with, not"
        )
        effect = "skipped steps reuse the last full one"
    elif any(entry.matches(schedule, sigmas) for entry in calibrations):
        return None
    else:
        kind, told = _difference(calibrations, trained, schedule, sigmas, sampler)
        effect = "forecasts are damped towards reuse where they differ"
    further = ", schedule=..." if kind == "list" else ""
    return Mismatch(
        kind,
        f"{told}; {effect}: for better pictures train for it, with this pipeline and scheduler, by "
        f"lesa.train(pipe, prompts, num_inference_steps={steps}, full_steps={count}{further})",
    )


def _difference(
    calibrations: Sequence[Calibration],
    trained: str,
    schedule: Schedule,
    sigmas: Sequence[float],
    sampler: str,
) -> Mismatch:
    """Which kind of difference it is, and what differs."""
    steps = {entry.schedule.steps for entry in calibrations}
    if schedule.steps not in steps:
        known = ", ".join(map(str, sorted(steps)))
        told = f"num_inference_steps={schedule.steps}: the forecaster was trained for {known}"
        return Mismatch("steps", told)
    apart = min(entry.distance(sigmas) for entry in calibrations)
    if apart > SIGMA_TOLERANCE:
        told = f"{sampler}: its noise levels are up to {apart:.2g} away from those of {trained}"
        return Mismatch("levels", f"{told}, which the forecaster was trained with")
    told = f"full_steps={list(schedule.full_steps)}: the forecaster was not trained on this list"
    return Mismatch("list", told)
