"""What an accelerated model did so far."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from lesa.util.forks import renew_in_children

__all__ = ["Counters", "Stats"]

logger = logging.getLogger("lesa")
NOT_FINITE = "full steps with NaN or inf in their feature"


@dataclass
class Stats:
    """Calls of the denoiser since it was enabled.

    `full` and `skipped` count calls, so each guidance branch by itself; `fallbacks` counts, by
    reason, the calls that had to be computed in full. `ring_bytes` is the cache of one generation,
    all branches together. `seconds_*` are the host's: on an accelerator work may still be queued.
    `graphs` counts what happened to CUDA graphs of skipped steps (captured, invalidated, failed,
    and refused with the reason). `left_out` names denoisers of the pipeline that run as before.
    `not_finite` counts full steps that left NaN or inf in the cache. `chosen` says for which target
    the full steps of the newest generation were chosen, and from what. `risk` is what a guard saw
    in it, None where none looked, and `extra_steps` are the full steps that it added; `guarded`
    counts the generations in which it acted (`lesa.forecasters.guard.Guard`). `off` counts calls
    inside of `lesa.options(off=True)`. `pool` holds bytes and counts of the memory that rings share
    (see `lesa.engine.pool.PoolState`).
    """

    forecaster: str = ""
    tap: str = ""
    full: int = 0
    skipped: int = 0
    generations: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    full_steps: tuple[int, ...] = ()
    num_steps: int = 0
    ring_bytes: int = 0
    seconds_full: float = 0.0
    seconds_skipped: float = 0.0
    graphs: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    not_finite: int = 0
    chosen: str = ""
    off: int = 0
    guarded: int = 0
    risk: float | None = None
    extra_steps: tuple[int, ...] = ()
    pool: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self) | {
            "full_steps": list(self.full_steps),
            "extra_steps": list(self.extra_steps),
        }

    def as_dict(self) -> dict[str, float]:
        """All numbers under the names that Prometheus scrapes: `lesa_calls_total{kind="full"}`."""
        found = {
            'lesa_calls_total{kind="full"}': self.full,
            'lesa_calls_total{kind="skipped"}': self.skipped,
            'lesa_calls_total{kind="off"}': self.off,
            'lesa_call_seconds_total{kind="full"}': self.seconds_full,
            'lesa_call_seconds_total{kind="skipped"}': self.seconds_skipped,
            "lesa_generations_total": self.generations,
            "lesa_guarded_total": self.guarded,
            "lesa_not_finite_total": self.not_finite,
            "lesa_ring_bytes": self.ring_bytes,
        }
        for state in ("used", "idle", "limit"):
            found[f'lesa_pool_bytes{{state="{state}"}}'] = self.pool.get(state, 0)
        for event in ("evicted", "refused"):
            found[f'lesa_pool_rings_total{{event="{event}"}}'] = self.pool.get(event, 0)
        for name, label, counts in (
            ("lesa_fallbacks_total", "reason", self.fallbacks),
            ("lesa_graph_events_total", "event", self.graphs),
        ):
            found |= {f'{name}{{{label}="{_escaped(k)}"}}': v for k, v in counts.items()}
        return found

    @classmethod
    def joined(cls, parts: Sequence[Stats]) -> Stats:
        """Of the denoisers of one pipeline: the first one's, with calls, bytes and seconds added.

        All take part in one generation, so the numbers of these are the largest.
        """
        most = {
            name: max(getattr(part, name) for part in parts) for name in ("generations", "guarded")
        }
        total = replace(parts[0], **most)
        sums = "full", "skipped", "off", "ring_bytes", "seconds_full", "seconds_skipped"
        for name in (*sums, "not_finite"):
            setattr(total, name, sum(getattr(part, name) for part in parts))
        for name in ("fallbacks", "graphs", "pool"):
            counts: Counter[str] = Counter()
            for part in parts:
                counts.update(getattr(part, name))
            setattr(total, name, dict(counts))
        return total

    def __str__(self) -> str:
        full = _milliseconds(self.seconds_full, self.full)
        skipped = _milliseconds(self.seconds_skipped, self.skipped)
        lines = [
            f"lesa: {self.forecaster}, {self.tap} tap, {self.generations} generation(s)",
            f"  full     {self.full:6d}  {full} each",
            f"  skipped  {self.skipped:6d}  {skipped} each",
            f"  steps    {len(self.full_steps)} of {self.num_steps} full: {self.full_steps}",
            f"  ring     {self.ring_bytes:,} bytes",
        ]
        if self.chosen:
            lines.append(f"  chosen   for {self.chosen}")
        if self.risk is not None:
            extra = f", more full steps: {self.extra_steps}" if self.extra_steps else ""
            lines.append(f"  guarded  {self.guarded:6d}  newest risk {self.risk:.3g}{extra}")
        if self.off:
            lines.append(f"  off      {self.off:6d}")
        lines += [f"  fallback {count:6d}  {why}" for why, count in self.fallbacks.items()]
        lines += [f"  graph    {count:6d}  {what}" for what, count in self.graphs.items()]
        if self.not_finite:
            lines.append(f"  {NOT_FINITE}: {self.not_finite}")
        lines += [f"  left out {name}: {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)


class Counters:
    """`Stats` that several threads write."""

    def __init__(self, forecaster: str, tap: str) -> None:
        self._stats = Stats(forecaster, tap)
        self._peaks: list[Tensor] = []  # of features, on their device
        self.renew()
        renew_in_children(self)

    def renew(self) -> None:
        """In a forked process: nobody else counts."""
        self._lock = threading.Lock()

    def add_full(self, seconds: float) -> None:
        """One call was computed in full."""
        with self._lock:
            self._stats.full += 1
            self._stats.seconds_full += seconds

    def add_skipped(self, seconds: float) -> None:
        """One call was forecast."""
        with self._lock:
            self._stats.skipped += 1
            self._stats.seconds_skipped += seconds

    def add_off(self) -> None:
        """One call was none of lesa's."""
        with self._lock:
            self._stats.off += 1

    def add_fallback(self, reason: str) -> bool:
        """One call could not be forecast; whether the reason is a new one."""
        with self._lock:
            known = self._stats.fallbacks.get(reason, 0)
            self._stats.fallbacks[reason] = known + 1
            return not known

    def add_generation(self) -> int:
        """A generation began; its number."""
        with self._lock:
            self._stats.generations += 1
            self._read_peaks()
            return self._stats.generations

    def watch(self, feature: Tensor) -> None:
        """Look for NaN and inf in a feature of a full step.

        One pass over it, and no wait for its device: what it found is read, all at once, at the
        first step of the next generation or when somebody asks.
        """
        peak = torch.linalg.vector_norm(feature.detach(), ord=float("inf"))
        with self._lock:
            self._peaks.append(peak)

    def _read_peaks(self) -> None:
        """Count the peaks so far that are not finite, and warn of the first ones."""
        by_kind: dict[Any, list[Tensor]] = {}
        for peak in self._peaks:
            by_kind.setdefault((peak.device, peak.dtype), []).append(peak)
        self._peaks = []
        values = [value for peaks in by_kind.values() for value in torch.stack(peaks).tolist()]
        found = sum(not isfinite(value) for value in values)
        if found and not self._stats.not_finite:
            logger.warning("%s: %d", NOT_FINITE, found)
        self._stats.not_finite += found

    def set_schedule(self, full_steps: tuple[int, ...], num_steps: int, chosen: str = "") -> None:
        """The schedule of the newest generation, and for which target it was chosen."""
        with self._lock:
            self._stats.chosen = chosen
            self._stats.risk, self._stats.extra_steps = None, ()
            self._stats.full_steps, self._stats.num_steps = full_steps, num_steps

    def set_risk(self, generation: int, risk: float) -> None:
        """What a guard saw in a generation, which is told of the newest one."""
        with self._lock:
            if generation == self._stats.generations:
                self._stats.risk = risk

    def add_guarded(
        self, generation: int, full_steps: tuple[int, ...], extra: tuple[int, ...]
    ) -> None:
        """A guard acts in a generation, whose full steps are these now."""
        with self._lock:
            self._stats.guarded += 1
            if generation == self._stats.generations:
                self._stats.full_steps, self._stats.extra_steps = full_steps, extra

    def set_ring_bytes(self, ring_bytes: int) -> None:
        """The cache of the newest generation."""
        with self._lock:
            self._stats.ring_bytes = ring_bytes

    def set_left_out(self, reasons: Mapping[str, str]) -> None:
        """Which denoisers of the pipeline are not accelerated, and why."""
        with self._lock:
            self._stats.left_out = dict(reasons)

    def snapshot(self) -> Stats:
        """A copy that does not change any more."""
        with self._lock:
            self._read_peaks()
            return replace(self._stats, fallbacks=dict(self._stats.fallbacks))


def _escaped(label: str) -> str:
    """A label's value as the exposition format writes it."""
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _milliseconds(seconds: float, count: int) -> str:
    return f"{1000 * seconds / count:9.3f} ms" if count else "        - ms"
