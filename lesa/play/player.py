"""Runs a pipeline for the page, plain and accelerated: one generation at a time, each kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import lesa
from lesa.core.checks import MOST_SEED, whole
from lesa.errors import LesaError
from lesa.hooks.timed_run import generate
from lesa.play.counts import Counts
from lesa.util.prompts import check_text

__all__ = ["Made", "Player"]

KEPT_BYTES = 1 << 30  # of pictures, until the oldest are forgotten


@dataclass(frozen=True)
class Made:
    """A picture [3, H, W], or a video [F, 3, H, W], in [0, 1] on the CPU, and its making.

    `seconds` are those of the denoising loop. `full_steps` are the steps of `num_steps` that ran
    the whole model; `notes` says what was computed in full besides, and why.
    """

    picture: Tensor
    seconds: float
    full_steps: tuple[int, ...]
    num_steps: int
    notes: tuple[str, ...] = ()


class Player:
    """A pipeline that is accelerated by a forecaster, for several visitors of one page.

    Runs wait for each other, since a pipeline serves one call at a time. What was made is kept by
    prompt, seed and count, so that another count costs an accelerated run alone.

    Raises: LesaError where the forecaster does not serve the pipeline; nothing is changed then.
    """

    def __init__(
        self,
        pipe: Any,
        forecaster: Any,
        settings: Mapping[str, Any],
        counts: Counts,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self.counts = counts
        self._pipe, self._settings = pipe, dict(settings)
        self._lock, self._made = threading.Lock(), _Kept(kept_bytes)
        self._closed = threading.Event()
        lesa.enable(pipe, forecaster, full_steps=counts.default)

    @property
    def num_steps(self) -> int:
        """Steps of the sampler."""
        return self.counts.num_steps

    def checked(self, prompt: Any, seed: Any) -> tuple[str, int]:
        """A prompt without blanks around it, and a seed.

        Raises: LesaError for an empty prompt, or a seed that is no whole number from 0.
        """
        text = prompt.strip() if isinstance(prompt, str) else ""
        if not text:
            raise LesaError("prompt='': it is empty; type what the picture shall show")
        return check_text(text, "prompt"), whole("seed", seed, 0, MOST_SEED)

    def warm_up(self, prompt: str, seed: int) -> int:
        """An accelerated run that nobody sees, since the first one also compiles and allocates.

        Returns how many frames the pipeline makes: 1 for a picture.
        """
        made = self._run(prompt, seed, self.counts.default)
        return len(made.picture) if made.picture.ndim == 4 else 1

    def kept(self, prompt: str, seed: int) -> Made | None:
        """The plain run of this prompt and seed, if it is still there."""
        return self._made.get((prompt, seed, None))

    def plain(self, prompt: str, seed: int) -> Made:
        """All steps in full, as if lesa were not there."""
        return self._once(prompt, seed, None)

    def accelerated(self, prompt: str, seed: int, count: int) -> Made:
        """`count` steps in full, the others forecast; LesaError for a count that is not offered."""
        return self._once(prompt, seed, self.counts.check(count, "full steps"))

    def close(self) -> None:
        """End a run at its next step, and let none begin: nobody waits for them any more."""
        self._closed.set()

    def _once(self, prompt: str, seed: int, count: int | None) -> Made:
        """What is kept of this run, else the run; a second visitor waits for the first one's."""
        with self._lock:
            key = (prompt, seed, count)
            return self._made.get(key) or self._made.put(key, self._run(prompt, seed, count))

    def _run(self, prompt: str, seed: int, count: int | None) -> Made:
        budget = lesa.options(off=True) if count is None else lesa.options(full_steps=count)
        before = lesa.stats(self._pipe).fallbacks
        with budget:
            run = generate(self._pipe, [prompt], [seed], self._settings, on_step=self._go_on)
        picture = run.images[0]
        if count is None:
            return Made(picture, run.seconds, tuple(range(self.num_steps)), self.num_steps)
        after = lesa.stats(self._pipe)
        more = {why: calls - before.get(why, 0) for why, calls in after.fallbacks.items()}
        notes = tuple(f"{calls} more in full: {why}" for why, calls in more.items() if calls)
        return Made(picture, run.seconds, after.full_steps, after.num_steps, notes)

    def _go_on(self) -> None:
        if self._closed.is_set():
            kind = type(self._pipe).__name__
            raise LesaError(f"pipeline={kind}: its page was closed; open it again")


class _Kept:
    """The newest runs: the last two, and further ones while all are below so many bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._runs: OrderedDict[Any, Made] = OrderedDict()

    def get(self, key: Any) -> Made | None:
        """A run, which counts as new again."""
        with self._lock:
            if key in self._runs:
                self._runs.move_to_end(key)
            return self._runs.get(key)

    def put(self, key: Any, made: Made) -> Made:
        """Keep a run, and forget the oldest ones."""
        with self._lock:
            self._runs[key] = made
            while len(self._runs) > 2 and self._bytes() > self._limit:
                self._runs.popitem(last=False)
            return made

    def _bytes(self) -> int:
        return sum(made.picture.nbytes for made in self._runs.values())
