"""Which calibrated count serves what a user asks for: a speed-up, a PSNR, or a word for quality."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import floor
from typing import Any, Literal, NamedTuple, get_args

from lesa.core.checks import real, shown
from lesa.errors import LesaError
from lesa.forecasters.calibration import Calibration, count_on
from lesa.forecasters.prior import Prior
from lesa.forecasters.worth import Worth, speedup

__all__ = ["QUALITIES", "Chosen", "Quality", "Target"]

Quality = Literal["best", "balanced", "fast"]
QUALITIES: tuple[Quality, ...] = get_args(Quality)

MOST_PSNR = 100  # dB, above which two runs differ by rounding alone
ROUNDED = 0.005  # what a speed-up may lack: it is shown with two decimals


class Chosen(NamedTuple):
    """A number of full steps for a run, and why it was taken."""

    full_steps: int
    why: str


@dataclass(frozen=True)
class Target:
    """What a run shall reach; one of the three is given.

    Args:
        speedup: denoising at least so many times faster than the plain run: the most calibrated
            full steps that are predicted to be.
        psnr: dB that nine pictures of ten reach: the fewest calibrated full steps whose p10 does.
        quality: "best", "balanced" or "fast": the most, the middle or the fewest calibrated full
            steps; of an even number of counts the middle is the larger one.

    Raises:
        LesaError: a value is not one of these.
    """

    speedup: float | None = None
    psnr: float | None = None
    quality: Quality | None = None

    def __post_init__(self) -> None:
        if self.speedup is not None:
            found = real("target_speedup", self.speedup, "give how many times faster, as 4")
            if found < 1:
                raise LesaError(f"target_speedup={found:g}: slower than plain; give 1 or more")
            object.__setattr__(self, "speedup", found)
        if self.psnr is not None:
            found = real("target_psnr", self.psnr, "give decibels, as 45")
            if not 0 < found <= MOST_PSNR:
                raise LesaError(
                    f"target_psnr={found:g}: no dB that a forecast reaches; give 20 to {MOST_PSNR}"
                )
            object.__setattr__(self, "psnr", found)
        known = isinstance(self.quality, str) and self.quality in QUALITIES
        if self.quality is not None and not known:
            raise LesaError(
                f"quality={shown(self.quality)}: not one of {', '.join(map(repr, QUALITIES))}; "
                "give one of these"
            )

    def __str__(self) -> str:
        if self.speedup is not None:
            return f"target_speedup={self.speedup:g}"
        return f"quality={self.quality!r}" if self.psnr is None else f"target_psnr={self.psnr:g}"

    def check(self, forecaster: Any) -> None:
        """LesaError if no number of steps that the forecaster was calibrated for can reach it. One
        that was never calibrated has a speed-up, but no decibels, and no counts but the prior's."""
        calibrations = getattr(forecaster, "calibrations", [])
        counts = self.quality is not None and isinstance(forecaster, Prior)
        if not calibrations and self.speedup is None and not counts:
            lacks = "counts to choose from" if self.psnr is None else "decibels"
            raise LesaError(
                f"{self}: {forecaster.name} was not trained on this model and has no {lacks}; give "
                "full_steps or target_speedup, or train one with lesa.train"
            )
        if calibrations:
            steps = dict.fromkeys(entry.schedule.steps for entry in calibrations)
            _first_of(partial(self.choose, calibrations, num_steps) for num_steps in steps)

    def choose(
        self,
        calibrations: Sequence[Calibration],
        num_steps: int,
        sigmas: Sequence[float] | None = None,
    ) -> Chosen:
        """The count for a run of `num_steps` steps with these S + 1 noise levels.

        What was calibrated for the nearest number of steps counts. Of a run of another number a
        speed-up keeps the share of full steps and quality their count, as `full_steps` does; no
        PSNR was measured there. Where the levels are not known yet, those of any calibration do.
        LesaError where no count reaches the target.
        """
        if sigmas is None:
            runs = dict.fromkeys(entry.sigmas for entry in calibrations)
            return _first_of(partial(self.choose, calibrations, num_steps, run) for run in runs)
        known = _nearest(calibrations, num_steps, sigmas)
        if self.psnr is not None:
            return self._by_psnr(calibrations, known, num_steps)
        if self.speedup is not None:
            return self._by_speedup(self.speedup, known, num_steps)
        place = {"best": 0, "balanced": (len(known) - 1) // 2, "fast": -1}[str(self.quality)]
        count = count_on(known[place].schedule, num_steps)
        return Chosen(count, f"{self} of {_listed(known)} calibrated")

    def _by_speedup(self, wanted: float, known: list[Calibration], num_steps: int) -> Chosen:
        """The first of the counts, largest first, that is fast enough."""
        offers: list[tuple[int, float]] = []
        for entry in known:
            count = max(1, len(entry.schedule.full_steps) * num_steps // entry.schedule.steps)
            share = None if entry.worth is None else entry.worth.share
            same = num_steps == entry.schedule.steps
            mean = entry.mean_full_steps if same else count  # no guard holds elsewhere
            offers.append((count, speedup(mean, num_steps, share)))
        for count, times in offers:
            if times >= wanted - ROUNDED:
                return Chosen(
                    count, f"{self} of {_listed(known)} calibrated, predicted {times:.2f}"
                )
        slow, fast = _down(offers[0][1]), _down(max(times for _, times in offers))
        told = f"{slow}" if slow == fast else f"{slow} to {fast}"
        raise LesaError(
            f"{self}: {_listed(known)} full steps are predicted to make {num_steps} steps {told} "
            f"times faster; ask for at most {fast}, or train with fewer full steps"
        )

    def _by_psnr(
        self, calibrations: Sequence[Calibration], known: list[Calibration], num_steps: int
    ) -> Chosen:
        """The last of the counts, largest first, whose p10 is high enough."""
        assert self.psnr is not None
        measured = [(c, c.worth) for c in known if c.worth and c.schedule.steps == num_steps]
        if not measured:
            raise LesaError(f"{self}: {_unmeasured(calibrations, num_steps)}")
        for entry, worth in reversed(measured):
            if worth.p10 >= self.psnr:
                count = len(entry.schedule.full_steps)
                return Chosen(count, f"{self} of {_listed(known)} calibrated, {_of(worth)}")
        low, high = (edge(_down(worth.p10) for _, worth in measured) for edge in (min, max))
        told = f"{high}" if low == high else f"{low} to {high}"
        raise LesaError(
            f"{self}: nine pictures of ten reach {told} dB with {_listed(known)} of {num_steps} "
            f"steps in full; ask for at most {high}, or train with more full steps"
        )


def _first_of(attempts: Iterable[Callable[[], Chosen]]) -> Chosen:
    """What the first attempt gives that does not fail; if all do, the first failure."""
    refusals = []
    for attempt in attempts:
        try:
            return attempt()
        except LesaError as refusal:
            refusals.append(refusal)
    raise refusals[0]


def _nearest(
    calibrations: Sequence[Calibration], num_steps: int, sigmas: Sequence[float]
) -> list[Calibration]:
    """Those of the nearest calibrated number of steps: of each count the one whose noise levels
    are nearest, the largest count first. `schedule_for` takes the same."""
    steps = min((c.schedule.steps for c in calibrations), key=lambda s: abs(s - num_steps))
    found: dict[int, Calibration] = {}
    for entry in calibrations:
        count = len(entry.schedule.full_steps)
        nearer = count not in found or entry.distance(sigmas) < found[count].distance(sigmas)
        if entry.schedule.steps == steps and nearer:
            found[count] = entry
    return [found[count] for count in sorted(found, reverse=True)]


def _unmeasured(calibrations: Sequence[Calibration], num_steps: int) -> str:
    """Why nothing is known of a run of this number of steps."""
    steps = sorted({c.schedule.steps for c in calibrations if c.worth})
    if not steps:
        return (
            "this forecaster does not say what it is worth; give full_steps or target_speedup, or "
            "train it anew"
        )
    return (
        f"nothing was measured in runs of {num_steps} steps, only of "
        f"{' and '.join(map(str, steps))}; run as many, or give full_steps or target_speedup"
    )


def _of(worth: Worth) -> str:
    """Where a p10 comes from."""
    whose = ", unseen ones among them" if worth.validated else " of the prompts of its own fit"
    return f"p10 {worth.p10:.1f} dB on {worth.pictures} pictures{whose}"


def _listed(entries: Sequence[Calibration]) -> str:
    """ "13, 10 and 8"."""
    *most, last = [str(len(entry.schedule.full_steps)) for entry in entries]
    return f"{', '.join(most)} and {last}" if most else last


def _down(value: float) -> float:
    """To one decimal downwards, so that it can be asked for."""
    return floor(10 * value + 1e-9) / 10
