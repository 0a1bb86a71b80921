"""Progress bars and log lines of a training run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


class Progress:
    """One bar per phase and one line per result on stderr; silent when ``quiet``.

    Lines are kept in ``lines``.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.lines: list[str] = []

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Iterator[Callable[[int], object]]:
        with tqdm(total=total, initial=done, desc=title, disable=self.quiet, leave=False) as bar:
            yield bar.update

    def line(self, text: str) -> None:
        self.lines.append(text)
        if not self.quiet:
            tqdm.write(text, file=sys.stderr)
