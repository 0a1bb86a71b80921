"""`manifest.jsonl`: what has been made in a folder, a line per prompt, by however many processes.

While pictures are made every process appends to a file of its own in a hidden folder; at the end,
or when the command is started again, the lines of all are merged.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lesa.errors import LesaError
from lesa.util.files import read_file, write_atomically
from lesa.util.ranks import Ranks

__all__ = ["MANIFEST", "Asked", "Made", "Manifest", "run_key"]

Asked = tuple[str, str, int]  # stem of the file, prompt, seed

MANIFEST, PARTS = "manifest.jsonl", ".lesa-manifest"
_MOST = 1 << 30  # bytes of a manifest
_REMEDY = "move it away, or choose another folder"


@dataclass(frozen=True)
class Made:
    """A line: the picture or video of a prompt.

    Attributes:
        file: in the manifest's folder; of a video the mp4 where there is one.
        rank: of the process that made it.
        seconds: of denoising, of its batch divided by the batch's prompts.
        full_steps: that ran the whole model.
        run: hash of all else that the pixels depend on, see `run_key`.
    """

    prompt: str
    file: str
    seed: int
    rank: int
    seconds: float
    full_steps: int
    run: str


class Manifest:
    """The lines of a folder; `add` keeps a new one at once."""

    def __init__(self, folder: Path, run: str = "", rank: int = 0) -> None:
        self.folder, self.run, self.rank = folder, run, rank
        self._own: Path | None = None
        self._known: dict[str, Made] | None = None

    def read(self) -> dict[str, Made]:
        """File -> its line, of those merged and those not yet.

        Raises: LesaError for a manifest that is of something else.
        """
        found: dict[str, Made] = {}
        path = self.folder / MANIFEST
        if os.path.lexists(path):
            text = read_file(path, _MOST, _REMEDY).decode(errors="replace")
            for number, line in enumerate(filter(str.strip, text.split("\n")), 1):
                made = _parsed(line)
                if made is None:
                    told = f"out={str(self.folder)!r}: line {number} of its {MANIFEST} is none of"
                    raise LesaError(f"{told} lesa generate's; {_REMEDY}")
                found[made.file] = made
        for part in self._parts():
            lines = part.read_text(errors="replace").split("\n")[:-1]  # a torn one has no end
            found |= {made.file: made for made in map(_parsed, lines) if made is not None}
        return found

    def finished(self, wanted: Sequence[Asked]) -> list[bool]:
        """Whether each has been made by this very run."""
        if self._known is None:
            self._known = {Path(file).stem: made for file, made in self.read().items()}

        def there(stem: str, prompt: str, seed: int) -> bool:
            made = (self._known or {}).get(stem)
            if made is None or (made.prompt, made.seed, made.run) != (prompt, seed, self.run):
                return False
            return (self.folder / made.file).is_file()

        return [there(*each) for each in wanted]

    def add(
        self, batch: Sequence[Asked], files: Sequence[str], seconds: float, full_steps: int
    ) -> None:
        """Keep the lines of a batch, of whose prompts each took so long."""
        if self._own is None:
            (self.folder / PARTS).mkdir(exist_ok=True)
            self._own = self.folder / PARTS / f"{self.rank}-{secrets.token_hex(4)}.part"
        lines = [
            _line(Made(prompt, name, seed, self.rank, seconds, full_steps, self.run))
            for (_, prompt, seed), name in zip(batch, files, strict=True)
        ]
        with open(self._own, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def merged(self, ranks: Ranks) -> Iterator[None]:
        """Merge once every rank is through; one that is alone, also where something ends it."""
        through = ranks.size == 1
        try:
            yield
            ranks.wait()
            through = True
        finally:
            if through and ranks.leads:
                self.merge()

    def merge(self) -> None:
        """One file of all lines whose pictures are still there, in the order of their names."""
        found = {name: made for name, made in self.read().items() if (self.folder / name).exists()}
        if found or (self.folder / MANIFEST).exists():
            lines = [_line(found[name]) for name in sorted(found, key=_place)]
            write_atomically(self.folder / MANIFEST, "".join(lines))
        for part in self._parts():
            part.unlink(missing_ok=True)
        with suppress(OSError):  # not there
            (self.folder / PARTS).rmdir()
        self._own = self._known = None

    def _parts(self) -> list[Path]:
        """What processes have noted and nobody has merged, the oldest first."""
        parts = (self.folder / PARTS).glob("*.part")
        return sorted(parts, key=lambda part: part.stat().st_mtime_ns)


def run_key(pipe: Any, forecaster: Any, told: dict[str, Any]) -> str:
    """Hash of what a run's pixels depend on beside prompt and seed: the weights, the sampler, the
    forecaster, and what else is told."""
    from torch.nn import Module

    from lesa.hooks.weights_hash import weights_hash

    parts = {name: part for name, part in pipe.components.items() if isinstance(part, Module)}
    config = dict(getattr(pipe.scheduler, "config", {}))
    facts = {
        "weights": {name: weights_hash(part) for name, part in parts.items()},
        "scheduler": [type(pipe.scheduler).__name__, config],
        "forecaster": _identity(forecaster),
        "told": told,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _identity(forecaster: Any) -> str:
    """A forecaster by its settings and coefficients."""
    if not hasattr(forecaster, "save_pretrained"):
        return repr(forecaster)
    with tempfile.TemporaryDirectory() as folder:
        forecaster.save_pretrained(folder)
        files = sorted(Path(folder).iterdir())
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _line(made: Made) -> str:
    return json.dumps(asdict(made), ensure_ascii=False) + "\n"


def _place(file: str) -> tuple[int, str]:
    """Where a file stands in the order of prompts, of which there may be more than 9,999."""
    number = file.partition("-")[0]
    return (int(number) if number.isdecimal() else 0, file)


def _parsed(line: str) -> Made | None:
    """A line; None for what is none."""
    kinds = {"prompt": str, "file": str, "seed": int, "rank": int, "full_steps": int, "run": str}
    try:
        found = json.loads(line)
        made = Made(**{**found, "seconds": float(found["seconds"])})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    right = all(type(getattr(made, name)) is kind for name, kind in kinds.items())
    return made if right and Path(made.file).name == made.file else None
