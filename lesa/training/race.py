"""Step lists race each other: the worse half stops where the rest is clearly ahead."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lesa.training.closed_loop import Race
from lesa.training.search import Judge, Steps

__all__ = ["Halving"]

CHECKS = (0.3, 0.5, 0.7)  # of all steps


class Halving:
    """Makes races of step lists, in which at three steps of a run the worse half has lost.

    What a rollout will end with is the error that its latents have now, carried to the end by the
    sampler alone, plus what the statistics say of its remaining skipped steps; its place in the
    race is that, averaged over pictures.
    """

    def __init__(self, lists: Sequence[Steps], judge: Judge, pictures: Sequence[int]) -> None:
        statistics, self.lists, self.judge, self.pictures = judge.statistics, lists, judge, pictures
        steps = statistics.num_steps
        self.checks = {round(share * steps) for share in CHECKS} - {0}
        keep = np.ones(steps) if statistics.sampler is None else statistics.sampler.keep.numpy()
        self.carried = np.cumprod(keep[::-1])[::-1] ** 2  # from each step to the end

    def __call__(self, together: Sequence[int]) -> Race:
        """The race of the lists of these numbers."""
        lists, running = [self.lists[i] for i in together], set(range(len(together)))

        def lost(step: int, errors: Tensor) -> list[int]:
            if step not in self.checks or len(running) < 2:
                return []
            ends = {copy: self._end(lists[copy], step, errors[copy]) for copy in running}
            ranked = sorted(running, key=ends.__getitem__)
            slower = ranked[(len(ranked) + 1) // 2 :]
            running.difference_update(slower)
            return slower

        return lost

    def _end(self, full_steps: Steps, step: int, error: Tensor) -> float:
        """Squared error with which a list is expected to end, where its latents have this one
        ``[pictures]``."""
        now = error.numpy() * self.carried[step] / self.judge.scale[self.pictures]
        return float((now + self.judge.remaining(full_steps, step)[self.pictures]).mean())
