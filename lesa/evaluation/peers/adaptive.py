"""Peers over lesa's hooks that no package maintains: FreqCa, TeaCache and SpeCa."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lesa.core.schedule import Schedule
from lesa.evaluation.method import Bench, Method, Peer
from lesa.evaluation.peers.forecasters import FORECASTERS
from lesa.evaluation.peers.freqca import freqca
from lesa.evaluation.peers.layouts import unfit_layout
from lesa.evaluation.peers.speca import speca
from lesa.evaluation.peers.teacache import polynomial_for, teacache
from lesa.evaluation.peers.thresholds import Applied, adaptive, needs_calibration


@dataclass(frozen=True)
class FreqCaPeer:
    """FreqCa on TaylorSeer's rule, as published, or on a given list."""

    takes_lists = True

    def unfit(self, bench: Bench) -> str | None:
        """It must know the token grid."""
        return unfit_layout(bench)

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """The interval with the fewest full steps that are not below `wanted`."""
        like = FORECASTERS["hicache"].build(name, wanted, bench, searched)
        assert like.schedule is not None  # as of every forecaster
        return replace(like, forecaster=None, applied=freqca(like.schedule))


@dataclass(frozen=True)
class Threshold:
    """A peer that decides by a threshold, which is found on the calibration prompts.

    applied: bench -> threshold -> what `Method.applied` is.
    """

    applied: Callable[[Bench], Callable[[float], Applied]]

    takes_lists = False

    def unfit(self, bench: Bench) -> str | None:
        """It looks into the blocks, and needs prompts for its threshold."""
        return unfit_layout(bench) or needs_calibration(bench)

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """The threshold with the fewest full steps that are not below `wanted` in the mean."""
        return adaptive(name, wanted, bench, self.applied(bench))


def _teacache(bench: Bench) -> Callable[[float], Applied]:
    polynomial = polynomial_for(bench)
    return lambda threshold: teacache(threshold, polynomial)


ADAPTIVE: dict[str, Peer] = {
    "freqca": FreqCaPeer(),
    "teacache": Threshold(_teacache),
    "speca": Threshold(lambda bench: speca),
}
