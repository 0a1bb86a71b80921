"""What a training run has cost so far, and what it keeps."""

from __future__ import annotations

from dataclasses import dataclass, field

from lesa.training.base_run import BaseRun
from lesa.util.progress import Bar

__all__ = ["HELD", "Work"]

HELD = 4  # features of a row beside the K that are cached: latents, outputs, what is being fitted


@dataclass
class Work:
    """What a training run has cost so far.

    Attributes:
        rows: that the denoiser has computed in full.
        width: rows that a step of one picture is, over all guidance branches; 0 until known.
        plain: rows of one plain generation per prompt, at all step counts.
        bar: of the phase that goes on.
        timed_rows, seconds: rows whose time was taken, and how long they took together.
        argument_bytes, feature_bytes: of a row of the denoiser's call, and of its tapped feature.
        bases: the plain runs that have been kept, by the number of steps that they had.
    """

    rows: int = 0
    width: int = 0
    plain: int = 0
    bar: Bar | None = None
    timed_rows: int = 0
    seconds: float = 0.0
    argument_bytes: int = 0
    feature_bytes: int = 0
    bases: dict[int, BaseRun] = field(default_factory=dict)

    def computed(self, rows: int, done: float | None = None) -> None:
        """The denoiser has computed so many more rows; `done` is that in the bar's unit."""
        self.rows += rows
        if self.bar is not None:
            self.bar.advance(rows if done is None else done)

    def bytes_of(self, history: int) -> int:
        """Bytes of a picture in a rollout, over all guidance branches."""
        return self.width * (self.argument_bytes + (history + HELD) * self.feature_bytes)

    def took(self, rows: int, seconds: float) -> None:
        """So many rows took so long."""
        self.timed_rows += rows
        self.seconds += seconds
