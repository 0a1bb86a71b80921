"""BudCache: the list of full steps by annealing and hill climbing on the final output."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lesa.core.schedule import Schedule
from lesa.evaluation.method import Bench, Method, Origin, Peer
from lesa.evaluation.peers.layouts import unfit_layout
from lesa.evaluation.peers.residual import residual_reuse
from lesa.evaluation.peers.thresholds import needs_calibration
from lesa.evaluation.peers.trajectories import Trial

__all__ = ["ANNEALED", "Search"]

PROMPTS = 2
ANNEALING = 200  # lists tried; released
HOTTEST, COLDEST = 0.05, 1e-5  # released temperatures, in the unit of the error
CLIMBS = 20  # rounds at most; released
RADIUS, JUMPS = 3, 2  # released: how far a full step moves in a round, and random moves of each
MOST = 400  # lists tried in all; the release has no such limit
Full = tuple[int, ...]


@dataclass
class Search:
    """Looks for the list of `wanted` full steps with the smallest error.

    The first max(1, wanted // 4) steps stay full. Simulated annealing from a random list moves one
    full step (two in a tenth of the moves) to a skipped one, in 7 of 10 cases near by, and accepts
    a worse list with probability exp(-change / T), T falling geometrically; then hill climbing goes
    to the best list that differs in one full step, moved by 3 at most or, twice for each, anywhere.

    error: full steps -> error; asked once for each list. most: lists asked for in all.
    """

    steps: int
    wanted: int
    error: Callable[[Full], float]
    most: int = MOST
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    known: dict[Full, float] = field(default_factory=dict)

    @property
    def lead(self) -> int:
        """How many steps at the start are full in all lists."""
        return max(1, self.wanted // 4)

    @property
    def spent(self) -> bool:
        """Has the search asked for as many lists as it may?"""
        return len(self.known) >= self.most

    def best(self) -> Full:
        """The best list that was tried."""
        current, current_error = self.start(), math.inf
        for turn in range(ANNEALING):
            if self.spent:
                break
            rival = self.moved(current) if turn else current
            change = self.judged(rival) - current_error
            heat = HOTTEST * (COLDEST / HOTTEST) ** (turn / ANNEALING)
            if change < 0 or self.draw.random() < math.exp(-change / heat):
                current, current_error = rival, self.known[rival]
        for _ in range(CLIMBS):
            rivals = [full for full in self.neighbours(current) if self.may(full)]
            found = min(rivals, key=self.judged, default=current)
            if self.judged(found) >= self.judged(current):
                break
            current = found
        return min(self.known, key=self.known.__getitem__)

    def may(self, full: Full) -> bool:
        """Judge a list if that is allowed; is its error known?"""
        if not self.spent:
            self.judged(full)
        return full in self.known

    def judged(self, full: Full) -> float:
        """The error of a list."""
        if full not in self.known:
            self.known[full] = self.error(full)
        return self.known[full]

    def start(self) -> Full:
        """A random list."""
        rest = self.draw.sample(range(self.lead, self.steps), self.wanted - self.lead)
        return tuple(sorted((*range(self.lead), *rest)))

    def moved(self, full: Full) -> Full:
        """A random neighbour of a list for the annealing."""
        free = [step for step in range(self.steps) if step not in full]
        ours = [step for step in full if step >= self.lead]
        if not free or not ours:
            return full
        if self.draw.random() < 0.1 and min(len(free), len(ours)) > 1:
            gone, come = self.draw.sample(ours, 2), self.draw.sample(free, 2)
        else:
            gone = [self.draw.choice(ours)]
            near = [step for step in free if abs(step - gone[0]) <= RADIUS]
            come = [self.draw.choice(near if near and self.draw.random() < 0.7 else free)]
        return tuple(sorted({*full}.difference(gone) | {*come}))

    def neighbours(self, full: Full) -> Iterator[Full]:
        """The lists of a round of hill climbing, each once."""
        seen = {full}
        for step in full[self.lead :]:
            near = range(max(self.lead, step - RADIUS), min(self.steps, step + RADIUS + 1))
            far = [self.draw.randrange(self.lead, self.steps) for _ in range(JUMPS)]
            for target in (*near, *far):
                rival = tuple(sorted({*full} - {step} | {target}))
                if len(rival) == len(full) and rival not in seen:
                    seen.add(rival)
                    yield rival


@dataclass(frozen=True)
class BudCache:
    """Reuse of the residual, h_hat_s = x_s + r_p, on the list whose run ends nearest to the plain
    one: mean squared error of the final latents over 2 calibration prompts (the release takes one
    or more), at most 400 lists per count. The optional second stage, which learns new noise levels,
    is left out: it changes the sampler, not the cache.
    Source: BudCache (arXiv 2606.13496).
    """

    takes_lists = True

    def unfit(self, bench: Bench) -> str | None:
        """It looks into the blocks, and searches on calibration prompts."""
        return unfit_layout(bench) or needs_calibration(bench)

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """Exactly `wanted` full steps, or the given ones."""
        steps, note = bench.num_steps, ""
        schedule = None if searched is None else searched.bind(steps)
        if schedule is None:
            trial = Trial(bench, PROMPTS)
            search = Search(
                steps,
                wanted,
                lambda full: trial.error(residual_reuse(Schedule.explicit(full, steps))),
                draw=random.Random(bench.seed),
            )
            schedule = Schedule.explicit(search.best(), steps)
            note = f"best of {len(search.known)} lists"
        origin: Origin = "own" if searched is None else "searched"
        return Method(
            name,
            steps,
            schedule=schedule,
            origin=origin,
            applied=residual_reuse(schedule),
            note=note,
        )


ANNEALED: dict[str, Peer] = {"budcache": BudCache()}
