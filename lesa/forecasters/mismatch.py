"""What a run has that a forecaster was not trained for, in one sentence with the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lesa.core.schedule import Schedule
from lesa.forecasters.calibration import SIGMA_TOLERANCE, Calibration


class Mismatch(NamedTuple):
    """kind: "noise", "steps", "levels", "list" or "guidance"; told: the sentence."""

    kind: str
    told: str


def mismatch(
    calibrations: Sequence[Calibration],
    trained: str,
    schedule: Schedule,
    sigmas: Sequence[float],
    sampler: str,
    noise: bool,
    kept: bool = False,
) -> Mismatch | None:
    """How a run differs from all calibrations, None where it does not, or nothing is forecast.

    Args:
        calibrations: of the forecaster.
        trained: the class of the scheduler that it was trained with, or "".
        schedule: of the run, bound.
        sigmas: its S + 1 noise levels.
        sampler: the class of its scheduler, or "".
        noise: whether that one adds noise, and the trained one did not.
        kept: whether its list only adds full steps to one that was fitted.
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
    elif any(entry.serves(schedule, sigmas) for entry in calibrations):
        return None
    else:
        kind, told = _difference(calibrations, trained, schedule, sigmas, sampler)
        damped = "forecasts are damped towards reuse where they differ"
        effect = "the rows of one with fewer full steps are kept" if kept else damped
    further = ", schedule=..." if kind == "list" else ""
    return Mismatch(
        kind,
        f"{told}; {effect}: for better pictures train for it, with this pipeline and scheduler, by "
        f"lesa.train(pipe, prompts, num_inference_steps={steps}, full_steps={count}{further})",
    )


class Excess(NamedTuple):
    """An argument of guidance whose scale is above that of the training."""

    name: str
    trained: float
    scale: float

    @property
    def ratio(self) -> float:
        """How many times above, in tenths: a server of many scales needs few tables. The trained
        one counts as 1 at least."""
        return round(self.scale / max(self.trained, 1.0), 1)

    def mismatch(self) -> Mismatch:
        """In a sentence with the remedy."""
        return Mismatch(
            "guidance",
            f"{self.name}={self.scale:g}: the forecaster was trained at {self.trained:g}; "
            "forecasts are damped towards reuse: for better pictures train for it, by "
            f"lesa.train(pipe, prompts, ..., {self.name}={self.scale:g})",
        )


EMBEDDED = {"guidance_scale", "distilled_guidance_scale"}  # scales that a denoiser is told


def excess(
    trained: Mapping[str, float],
    scales: Mapping[str, float],
    embedded: bool,
    before: bool,
    now: bool,
) -> Excess | None:
    """The scale of guidance that is most above that of the training, None where none is.

    Below it nothing is wrong: rows fitted at a larger scale forecast the smoother outputs of a
    smaller one at least as well.

    Args:
        trained, scales: of the training and of a run, by the names of the pipeline's arguments.
        embedded: whether the denoiser is told the scale.
        before, now: whether the training, and the run, have guidance as outputs of their own. If
            the training had none, its scale counts as 1.
    """
    found = []
    for name, scale in scales.items():
        first = name.removesuffix("_2")  # a second denoiser may have the scale of the first
        at = trained.get(name, trained.get(first))
        told = embedded and name in EMBEDDED
        if at is not None and (told or now or (before and at > 1)):
            found.append(Excess(name, at if told or before else min(at, 1.0), scale))
    most = max(found, key=lambda each: each.ratio, default=None)
    return most if most is not None and most.ratio > 1 else None


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
