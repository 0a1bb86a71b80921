"""How far long work is: a bar with the time left in a terminal, a line per phase in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

__all__ = ["Bar", "Progress"]

HEARTBEAT = 30.0  # seconds after which a log gets one more line of a phase that is not over


class Bar:
    """One phase of the work.

    Attributes:
        total: the work, in any unit; 0 where it is not known, and then no time left is told.
        completed: how much of it is done.
        detail: what the closing line says behind the seconds.
    """

    def __init__(self, title: str, total: float, completed: float = 0.0) -> None:
        self.title, self.total, self.completed = title, total, completed
        self.label, self.detail = "", ""
        self._first, self._started = completed, time.perf_counter()
        self._moved = self._started

    def advance(self, amount: float = 1.0, label: str = "") -> None:
        """So much more is done; `label` is what has just ended."""
        self.completed += amount
        self.label = label or self.label
        self._moved = time.perf_counter()

    def extend(self, amount: float) -> None:
        """So much more is to be done than was thought."""
        self.total += amount

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self._started

    @property
    def left(self) -> float | None:
        """Seconds until its end at the mean rate so far; None where that cannot be told."""
        done = self.completed - self._first
        if done <= 0 or not self.total:
            return None
        then = (self._moved - self._started) * (self.total - self.completed) / done
        return max(0.0, then - (time.perf_counter() - self._moved))

    def __str__(self) -> str:
        """As a log tells it: "collect: 40 %, 1:20 left"."""
        share = f"{self.completed / self.total:.0%}" if self.total else clock(self.seconds)
        left = "" if self.left is None else f", {clock(self.left)} left"
        return f"{self.title}: {share}{left}"


class _Logged(Bar):
    """A bar that is told to a log: a line every `HEARTBEAT` seconds."""

    def __init__(self, progress: Progress, *about: Any) -> None:
        super().__init__(*about)
        self._progress, self._told = progress, 0.0

    def advance(self, amount: float = 1.0, label: str = "") -> None:
        super().advance(amount, label)
        if self.seconds - self._told > HEARTBEAT:
            self._told = self.seconds
            self._progress.show(str(self))


class Progress:
    """Phases and results of long work, on stderr; nothing is written when `quiet`.

    Attributes:
        lines: what was said, a line per phase and per result.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.lines: list[str] = []

    @contextmanager
    def bar(self, title: str, total: float, done: float = 0.0) -> Iterator[Bar]:
        """A phase of which `done` of `total` is done; its seconds become a line at its end."""
        terminal = not self.quiet and self._console().is_terminal
        logged = not (terminal or self.quiet)
        bar = _Logged(self, title, total, done) if logged else Bar(title, total, done)
        with self._drawn(bar) if terminal else nullcontext():
            yield bar
        self.line(f"{title}: {bar.seconds:.1f} s{', ' * bool(bar.detail)}{bar.detail}")

    def line(self, text: str) -> None:
        """A result that stays."""
        self.lines.append(text)
        self.show(text)

    def show(self, text: str) -> None:
        """Write a line that is not kept."""
        if not self.quiet:
            self._console().print(text, markup=False, highlight=False, soft_wrap=True)

    def _console(self) -> Any:
        from rich.console import Console

        return Console(stderr=True)

    def _drawn(self, bar: Bar) -> AbstractContextManager[Any]:
        """The bar on the terminal, where it moves by itself and is gone at its end."""
        from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
        from rich.progress import Progress as Display
        from rich.text import Text

        class Left(ProgressColumn):
            def render(self, task: Task) -> Text:
                display.update(task.id, completed=bar.completed, total=bar.total or None)
                left = "" if bar.left is None else f", {clock(bar.left)} left"
                label = f"  {bar.label}" if bar.label else ""
                return Text(f"{clock(bar.seconds)}{left}{label}", no_wrap=True, overflow="ellipsis")

        title = TextColumn("{task.description}", markup=False)
        columns = (SpinnerColumn(), title, BarColumn(24), Left())
        display = Display(*columns, console=self._console(), transient=True, refresh_per_second=4)
        display.add_task(bar.title, total=bar.total or None, completed=round(bar.completed))
        return display


def clock(seconds: float) -> str:
    """83.4 -> "1:23", 4000 -> "1:06:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
