"""Whether changed files of a forecaster and of statistics work or are refused in one sentence.

The folders to change are made in tests/fuzzed_folders.py.
"""

from __future__ import annotations

import hashlib
import json
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

from file_mutations import (
    bytes_changed,
    header_changed,
    json_changed,
    metadata_changed,
    tensors_changed,
)
from shaken_forecasters import levels
from typer.testing import CliRunner

from lesa import LesaError, LesaForecaster
from lesa.cli import app
from lesa.training.search import search_schedule
from lesa.training.statistics import Statistics

CONFIG, WEIGHTS, STATISTICS = "config.json", "model.safetensors", "statistics-6.safetensors"
SLOW = 10.0  # seconds after which one load is a fault
LONGEST = 1000  # characters of a sentence that somebody still reads
LARGEST = 1e5  # sum of a row's coefficients, beyond which a picture is lost

Ended = tuple[str, str]  # how a use ended, and what there is to tell


class TooSlow(BaseException):
    """A file that keeps its reader busy; no handler of errors catches it."""


class Fuzz:
    """The three files of a folder, and what became of changed copies of them.

    The folder is written to; `accelerated` uses a forecaster that was loaded from it. `ended`
    counts by the first change and the end; `faults` has all ends other than working and one
    sentence, each with the seed that makes it again.
    """

    def __init__(
        self, folder: Path, accelerated: Callable[[LesaForecaster], Ended] | None = None
    ) -> None:
        self.folder, self.accelerated = folder, accelerated
        self.files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS, STATISTICS)}
        recorded = json.loads(self.files[CONFIG])["metadata"]
        self.model = {name: recorded.get(name) for name in ("model_class", "model_hash")}
        self.scheduler = recorded.get("scheduler", "")
        self.ended: Counter[tuple[str, str]] = Counter()
        self.faults: list[dict[str, Any]] = []

    def run(self, count: int, seed: int = 0, told: Callable[[str], None] = lambda _: None) -> Fuzz:
        """So many changes, each drawn from a generator of its own."""
        for number in range(count):
            self.one(f"{seed}.{number}")
            if (number + 1) % 100 == 0:
                told(f"{number + 1} changed files, {len(self.faults)} faults")
        self._restore()
        return self

    def one(self, seed: str) -> str:
        """Make one change, use the files, and count how that ended."""
        random = Random(seed)
        self._restore()
        name, kinds, content = self._changed(random)
        (self.folder / name).write_bytes(content)
        check = self._statistics if name == STATISTICS else self._forecaster
        try:
            with warnings.catch_warnings(), within(SLOW):
                warnings.simplefilter("ignore")
                ended, told = check()
        except (Exception, TooSlow) as error:
            where = traceback.extract_tb(error.__traceback__)
            places = [f"{Path(at.filename).name}:{at.lineno}" for at in where[-3:]]
            ended, told = type(error).__name__, f"{' '.join(places)}: {str(error)[:300]}"
        self.ended[f"{name}: {kinds[0]}", ended] += 1
        if ended not in ("works", "sentence"):
            self.faults.append(
                {"seed": seed, "file": name, "kinds": kinds, "ended": ended, "told": told}
            )
        return ended

    def to_dict(self) -> dict[str, Any]:
        """Counts by kind and by end, and the faults."""
        kinds: dict[str, dict[str, int]] = {}
        for (kind, ended), count in sorted(self.ended.items()):
            kinds.setdefault(kind, {})[ended] = count
        ends: Counter[str] = Counter()
        for (_, ended), count in self.ended.items():
            ends[ended] += count
        return {"changes": sum(ends.values()), "ended": dict(ends), "kinds": kinds,
                "faults": self.faults}  # fmt: skip

    def _restore(self) -> None:
        for name, content in self.files.items():
            (self.folder / name).write_bytes(content)

    def _changed(self, random: Random) -> tuple[str, list[str], bytes]:
        """A file, the kinds of one or two changes and its new content; the hash in the config is
        made right."""
        name = random.choices((CONFIG, WEIGHTS, STATISTICS), (3, 3, 2))[0]
        kind, content = _change(random, name, self.files[name])
        kinds = [kind]
        if random.random() < 0.3:
            with suppress(Exception):  # it finds nothing to change in what the first one left
                kind, content = _change(random, name, content)
                kinds.append(kind)
        if name == WEIGHTS and random.random() < 0.9:
            config = json.loads(self.files[CONFIG])
            config["weights_sha256"] = hashlib.sha256(content).hexdigest()
            (self.folder / CONFIG).write_text(json.dumps(config))
            kinds[0] += ", hash made right"
        return name, kinds, content

    def _forecaster(self) -> Ended:
        """Load it, make its tables, use it and describe it."""
        shown = [
            CliRunner().invoke(app, ["inspect", str(self.folder), *options])
            for options in ((), ("--json", "-"))
        ]
        exits = {result.exit_code for result in shown}
        odd = [mark for mark in ("Traceback", "\x1b") for r in shown if mark in r.output]
        if exits not in ({0}, {2}) or odd:
            return "inspect", f"exits {exits}, {odd}, {[result.exception for result in shown]}"
        try:
            forecaster = LesaForecaster.from_pretrained(self.folder)
        except LesaError as error:
            return sentence(error) if exits == {2} else ("inspect", "shows what does not load")
        try:
            forecaster.check_model(**self.model)
            wrong = self._tables(forecaster)
        except LesaError as error:
            return sentence(error)
        if wrong:
            return "not finite or too large", wrong
        if exits == {2}:
            return "inspect", f"refuses what loads: {shown[0].output[:300]}"
        json.loads(shown[1].stdout)
        return self.accelerated(forecaster) if self.accelerated else ("works", "")

    def _tables(self, forecaster: LesaForecaster) -> str:
        """What is wrong with its tables, where it was calibrated and at two other step counts."""
        plans = [(entry.schedule, entry.sigmas) for entry in forecaster.calibrations]
        for steps in (12, 50):
            plans.append((forecaster.schedule_for(5, steps, levels(steps)), levels(steps)))
        for plan, sigmas in plans:
            forecaster.mismatch(plan, sigmas, self.scheduler)
            for branch in forecaster.branches:
                table = forecaster.table(plan, sigmas, branch)
                if not table.coefficients.abs().sum(1).max() < LARGEST:
                    return f"{branch} of {plan}"[:300]
        return ""

    def _statistics(self) -> Ended:
        """Load them and search a list of full steps, as a training does that goes on."""
        try:
            found = Statistics.load(self.folder / STATISTICS)
            search_schedule(found, min(3, found.num_steps))
        except LesaError as error:
            return sentence(error)
        means = [found.mean(branch) for branch in found.branches]
        if not all(each.isfinite().all() for each in (*means, found.joint)):
            return "not finite", "statistics"
        return "works", ""


def _change(random: Random, name: str, data: bytes) -> tuple[str, bytes]:
    """One change to the content of the file of that name."""
    if name == CONFIG:
        if random.random() < 0.2:
            return bytes_changed(random, data)
        kind, text = json_changed(random, data.decode())
        return kind, text.encode()
    changes: list[Callable[[Random, bytes], tuple[str, bytes]]] = [
        bytes_changed, header_changed, tensors_changed, tensors_changed,
    ]  # fmt: skip
    changes += [lambda r, d: metadata_changed(r, d, "lesa")] * 3
    return random.choice(changes)(random, data)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """TooSlow in this, the main thread, where a block takes longer."""

    def stop(*_: object) -> None:
        raise TooSlow(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def sentence(error: LesaError) -> Ended:
    """Whether an error is one line that any terminal prints."""
    told = str(error)
    if not told or len(told) > LONGEST:
        return "length", f"{len(told)} characters: {told[:100]}"
    odd = [c for c in told if not c.isprintable()]
    return ("odd characters", ascii(told)[:300]) if odd else ("sentence", "")
