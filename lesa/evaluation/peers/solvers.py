"""Fewer steps: the same model, no cache, a shorter run."""

from __future__ import annotations

from dataclasses import dataclass

from lesa.evaluation.method import Bench, Method
from lesa.schedule import Schedule


@dataclass(frozen=True)
class FewerSteps:
    """A shorter run of the pipeline's own sampler on its default timesteps."""

    takes_lists = False

    def unfit(self, bench: Bench) -> str | None:
        """It runs on every pipeline."""
        return None

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """As many steps as wanted."""
        return Method(name, wanted)


SOLVERS = {"fewer-steps": FewerSteps()}
