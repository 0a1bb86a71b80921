"""Whether changed files of a forecaster and of statistics work or are refused in one sentence."""

from __future__ import annotations

import hashlib
import json
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
from file_mutations import (
    bytes_changed,
    header_changed,
    json_changed,
    metadata_changed,
    tensors_changed,
)
from tiny_pipelines import build, run
from typer.testing import CliRunner

import lesa
from lesa import LesaError, LesaForecaster
from lesa.cli import app
from lesa.training.search import search_schedule
from lesa.training.statistics import Statistics

CONFIG, WEIGHTS, STATISTICS = "config.json", "model.safetensors", "statistics-6.safetensors"
STEPS, FULL, SLOW = 6, 3, 10.0  # SLOW: seconds after which one load is a fault
LONGEST = 1000  # characters of a sentence that somebody still reads

Kept = dict[str, bytes]


class TooSlow(BaseException):
    """A file that keeps its reader busy; no handler of errors catches it."""


class Fuzz:
    """A small forecaster and its statistics, and what became of changed copies of them.

    `folder` is written to. `ended` counts by kind of change and end; `faults` has all ends other
    than working and one sentence, each with the seed that makes it again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pipe, call = build("flux")
        self.call = {**call(), "true_cfg_scale": 1.0}
        left_out = ("num_inference_steps", "generator", "output_type")
        given = {k: v for k, v in self.call.items() if k not in left_out}
        options = {"refine": 0, "polish": 0, "progress": False, "folder": folder, "call": given}
        forecaster = lesa.train(self.pipe, None, STEPS, FULL, form="continuous", **options)
        forecaster.save_pretrained(folder)
        files = (CONFIG, WEIGHTS, STATISTICS)
        self.files: Kept = {name: (folder / name).read_bytes() for name in files}
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
        name, kind, content = self._changed(random)
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
        self.ended[f"{name}: {kind}", ended] += 1
        if ended not in ("works", "sentence"):
            self.faults.append(
                {"seed": seed, "file": name, "kind": kind, "ended": ended, "told": told}
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

    def _changed(self, random: Random) -> tuple[str, str, bytes]:
        """A file, the kind of change and its new content; the config's hash is made right."""
        name = random.choices((CONFIG, WEIGHTS, STATISTICS), (3, 3, 2))[0]
        data = self.files[name]
        if name == CONFIG:
            if random.random() < 0.2:
                return name, *bytes_changed(random, data)
            kind, text = json_changed(random, data.decode())
            return name, kind, text.encode()
        changes: list[Callable[[Random, bytes], tuple[str, bytes]]] = [
            bytes_changed, header_changed, tensors_changed, tensors_changed,
        ]  # fmt: skip
        if name == STATISTICS:
            changes += [lambda r, d: metadata_changed(r, d, "lesa")] * 3
        kind, content = random.choice(changes)(random, data)
        if name == WEIGHTS and random.random() < 0.9:
            config = json.loads(self.files[CONFIG])
            config["weights_sha256"] = hashlib.sha256(content).hexdigest()
            (self.folder / CONFIG).write_text(json.dumps(config))
            kind += ", hash made right"
        return name, kind, content

    def _forecaster(self) -> tuple[str, str]:
        """Load it, make its tables, run it and describe it."""
        printed = CliRunner().invoke(app, ["inspect", str(self.folder), "--json", "-"])
        shown = CliRunner().invoke(app, ["inspect", str(self.folder)])
        try:
            forecaster = LesaForecaster.from_pretrained(self.folder)
        except LesaError as error:
            for result in (printed, shown):
                if result.exit_code != 2 or "Traceback" in result.output:
                    return "inspect", f"exit {result.exit_code}, {result.exception!r}"
            return sentence(error)
        for entry in forecaster.calibrations:
            table = forecaster.table(entry.schedule, entry.sigmas, forecaster.branches[0])
            if not table.coefficients.isfinite().all():
                return "not finite", "the table of its own schedule"
        try:
            with lesa.accelerate(self.pipe, forecaster, full_steps=2):
                picture = run(self.pipe, self.call | {"num_inference_steps": 4})
                reasons = [*lesa.stats(self.pipe).fallbacks]
        except LesaError as error:
            return sentence(error)
        if not picture.isfinite().all():
            return "not finite", "a picture of 4 steps"
        if any("Error" in reason for reason in reasons):
            return "error in a step", reasons[0][:300]
        for result in (printed, shown):
            if result.exit_code not in (0, 2) or "\x1b" in result.output:
                return "inspect", f"exit {result.exit_code}, {result.exception!r}"
        json.loads(printed.stdout)
        return "works", ""

    def _statistics(self) -> tuple[str, str]:
        """Load them and search a list of full steps, as a training does that goes on."""
        try:
            found = Statistics.load(self.folder / STATISTICS)
            search_schedule(found, min(FULL, found.num_steps))
        except LesaError as error:
            return sentence(error)
        means = [found.mean(branch) for branch in found.branches]
        if not all(torch.isfinite(mean).all() for mean in means):
            return "not finite", "statistics"
        return "works", ""


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


def sentence(error: LesaError) -> tuple[str, str]:
    """Whether an error is one line that any terminal prints."""
    told = str(error)
    if not told or len(told) > LONGEST:
        return "length", f"{len(told)} characters: {told[:100]}"
    odd = [c for c in told if not c.isprintable()]
    return ("odd characters", ascii(told)[:300]) if odd else ("sentence", "")
