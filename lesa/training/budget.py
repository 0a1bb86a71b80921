"""What a training may cost, in plain generations, and what each phase gets of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lesa.core.checks import real, shown
from lesa.errors import LesaError
from lesa.util.progress import clock

__all__ = ["ENOUGH", "EXTRA", "Budget", "Shares", "default_judges", "quarter"]

ENOUGH = 8  # prompts, of which some can be held out

UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
# Plain generations per prompt that the calibration of one number of full steps may cost where no
# budget is given: as much as so many accelerated runs, but at least and at most so many, and less
# where there are several numbers.
RUNS, LEAST, MOST, MOST_EACH = 5, 1.5, 3.0, 2.25
FEW = 10  # prompts that cost the most; more prompts cost as much in all, until each has the least
EXTRA = 2  # full steps that a guard adds where it spends more
FIT, RACES = 0.13, 0.57  # shares of the fit on all prompts, and of races in what is left


@dataclass(frozen=True)
class Budget:
    """So many plain generations, or so many seconds, in all; with neither as much as pays, and as
    much more as the search for a guard takes, if there is one.

    A plain generation of one prompt at all numbers of steps is the unit: it is what the denoiser
    computes without acceleration.
    """

    generations: float | None = None
    seconds: float | None = None
    guard: bool = False

    @classmethod
    def parse(cls, value: Any) -> Budget:
        """None, a number of plain generations, or a time such as "20min", "90s" or "1.5h".

        Raises LesaError for anything else.
        """
        if value is None:
            return cls()
        if not isinstance(value, str):
            number = real("budget", value, 'give plain generations, or a time such as "20min"')
            found = cls(generations=number)
        else:
            match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h)?\s*", value)
            if match is None:
                raise LesaError(
                    f"budget={shown(value)}: neither a number of plain generations nor a time; "
                    'give 40, "90s", "20min" or "1.5h"'
                )
            number = float(match[1])
            found = cls(seconds=number * UNITS[match[2]]) if match[2] else cls(generations=number)
        if number <= 0:
            raise LesaError(f"budget={shown(value)}: nothing can be trained for that; give more")
        return found

    def check(self, prompts: int, judging: int, full_steps: Sequence[int], num_steps: int) -> None:
        """LesaError, before anything runs, where it does not pay for a plain run of every prompt,
        one fit of every number of full steps, and what the prompts that judge say of it."""
        least = self._least(prompts, judging, full_steps, num_steps)
        if self.generations is not None and self.generations < least:
            raise LesaError(
                f"budget={self.generations:g}: {prompts} prompts need {least:.1f} plain "
                f"generations, one each and an accelerated run per number of full steps, "
                f"{'three with a guard, ' * self.guard}and one more of those that judge; give "
                f"{least:.1f} or more"
                f"{self._or_fewer(self.generations, prompts, judging, full_steps, num_steps)}"
            )

    def per_prompt(self, full_steps: int, counts: int, num_steps: int, prompts: int) -> float:
        """Plain generations per prompt for the calibration of one of so many numbers of full
        steps, beside the one of the plain run and the search for a guard; a time must be `known`
        first."""
        if self.generations is None:
            most = MOST if counts == 1 else MOST_EACH
            shared = ((1 + counts * most) * FEW / prompts - 1) / counts
            return min(most, max(LEAST, RUNS * full_steps / num_steps, shared))
        share = (self.generations / prompts - 1) / counts - self.guarding(full_steps, num_steps)
        return max(full_steps / num_steps, share)

    def guarding(self, full_steps: int, num_steps: int) -> float:
        """Plain generations per prompt that the search for a guard takes, at most: two accelerated
        runs, one of them with some full steps more."""
        return self.guard * (2 * full_steps + EXTRA) / num_steps

    def whole(self, prompts: int, full_steps: Sequence[int], num_steps: int) -> float:
        """Plain generations of all prompts together, at most; a time must be `known` first."""
        counts = len(full_steps)
        each = [
            self.per_prompt(n, counts, num_steps, prompts) + self.guarding(n, num_steps)
            for n in full_steps
        ]
        return prompts * (1 + sum(each))

    def known(
        self, seconds: float, prompts: int, judging: int, full_steps: Sequence[int], steps: int
    ) -> Budget:
        """The budget in plain generations, once one is known to take so many seconds.

        Raises LesaError where the time does not pay for the least.
        """
        if self.seconds is None:
            return self
        generations = self.seconds / seconds
        least = self._least(prompts, judging, full_steps, steps)
        if generations < least:
            raise LesaError(
                f"budget={self.seconds:g}s: a plain generation takes {seconds:.1f} s, so that "
                f"{prompts} prompts need {clock(least * seconds)}; give that or more"
                f"{self._or_fewer(generations, prompts, judging, full_steps, steps)}"
            )
        return replace(self, generations=generations, seconds=None)

    def estimate(
        self,
        seconds: float,
        prompts: int,
        full_steps: Sequence[int],
        num_steps: int,
        word: str = "at most",
    ) -> str:
        """What the whole costs at most, or in another word, as one line."""
        whole = self.whole(prompts, full_steps, num_steps)
        return (
            f"estimate: {word} {clock(whole * seconds)} for {whole:.0f} plain generations of "
            f"{seconds:.2g} s"
        )

    def _least(
        self, prompts: int, judging: int, full_steps: Sequence[int], num_steps: int
    ) -> float:
        guards = sum(self.guarding(n, num_steps) for n in full_steps)
        return prompts * (1 + guards) + (prompts + judging) * sum(full_steps) / num_steps

    def _or_fewer(
        self,
        generations: float,
        prompts: int,
        judging: int,
        full_steps: Sequence[int],
        num_steps: int,
    ) -> str:
        """How many prompts so many plain generations would pay for, if for any; where none are held
        out, all of them judge. The search for a guard takes `ENOUGH`."""
        default = judging == default_judges(prompts)
        for fewer in range(prompts - 1, ENOUGH - 1 if self.guard else 0, -1):
            judges = default_judges(fewer) if default else min(fewer, judging)
            if self._least(fewer, judges, full_steps, num_steps) <= generations:
                return f", or at most {fewer} prompt{'s' * (fewer > 1)}"
        return ""


@dataclass(frozen=True)
class Shares:
    """What the phases of one number of full steps get, in full steps of a prompt.

    A fit on all prompts and the judging at the end come first; of the rest more than half is for
    races of step lists.
    """

    race: float
    fit: float
    joint: float

    @classmethod
    def of(cls, whole: float, prompts: int, judging: int, full_steps: int) -> Shares:
        """The shares of a whole."""
        left = whole - judging * full_steps
        fit = max(FIT * left, prompts * full_steps)
        rest = max(0.0, left - fit)
        return cls(RACES * rest, fit, (1 - RACES) * rest)


def quarter(prompts: int) -> int:
    """How many of the prompts are held out where nothing is said."""
    return prompts // 4 if prompts >= ENOUGH else 0


def default_judges(prompts: int) -> int:
    """How many prompts judge where nothing is said: those held out, or all."""
    return quarter(prompts) or prompts
