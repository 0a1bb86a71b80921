"""Processes killed with SIGKILL while they train or save, and what their folders hold then.

The processes are forked from a server that has imported everything, so that a kill costs a run and
no imports.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load

from lesa import LesaError, LesaForecaster, Schedule

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HEAVY = [
    "lesa.cli.run_train",
    "lesa.training.train",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(HEAVY)


def trainings(
    command: list[str], folder: Path, rounds: int, seed: int = 0, most: int = 8
) -> dict[str, Any]:
    """`lesa train` killed again and again until it ends, against a run that nobody disturbs.

    Every second round begins in a folder with an older forecaster, which has to stay whole until
    the new one is in its place. After `most` kills a round ends undisturbed.
    """
    random, found = Random(seed), Counter[str](rounds=rounds)
    _ended(_SERVER.Process(target=_nothing))  # the server has imported everything
    begun = time.monotonic()
    wanted = _finished(command, folder / "undisturbed")
    seconds, broken = time.monotonic() - begun, []
    for number in range(rounds):
        target = folder / str(number)
        if number % 2:
            older().save_pretrained(target)
        by_files = number % 4 in (0, 3)
        when = _at_a_write(random, target) if by_files else _at_random(random, seconds)
        kills = 0
        while not _killed(command, target, when if kills < most else _never):
            kills += 1
            broken += not_whole(target)
        found["kills"] += kills
        found["left over"] += len([*target.glob(".*.part")])
        found["identical" if hashes(target) == wanted else "other weights"] += 1
    return dict(found) | {"not whole": broken}


def savings(folder: Path, rounds: int, seed: int = 0) -> dict[str, Any]:
    """A process that saves one forecaster over another is killed: the folder holds one of them."""
    random, ended, broken = Random(seed), Counter[str](), []
    older().save_pretrained(folder)
    for _ in range(rounds):
        process = _SERVER.Process(target=_save_forever, args=(str(folder),))
        begun = _changes(folder)
        process.start()
        while _changes(folder) == begun and process.is_alive():
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))
        _kill(process)
        found = not_whole(folder)
        broken += found
        ended["not whole" if found else _which(folder)] += 1
    return {"kills": rounds, "ended": dict(ended), "not whole": broken[:10],
            "left over": len([*folder.glob(".*.part")])}  # fmt: skip


def older(number: int = 1) -> LesaForecaster:
    """A small forecaster; those of two numbers differ."""
    forecaster = LesaForecaster("table", branches=("cond",), metadata={"seed": number})
    schedule = Schedule.explicit([0, 2, 4], 6)
    levels = [1 - step / 6 for step in range(7)]
    rows = torch.zeros(6, forecaster.net.history + forecaster.uses_latent)
    rows[1::2, 0] = number
    forecaster.correct(schedule, levels, "cond", rows)
    return forecaster


def _which(folder: Path) -> str:
    """Whose rows and whose metadata a folder holds."""
    loaded = LesaForecaster.from_pretrained(folder)
    row = loaded.calibrations[0].rows["cond"][1]
    same = int(row[0]) == loaded.metadata["seed"] and not row[1:].any()
    return f"forecaster {int(row[0])}" if same else "parts of two"


def hashes(folder: Path) -> tuple[str, ...]:
    """sha256 of the weights and of the config, but for what was measured in seconds."""
    tensors = sorted(load((folder / WEIGHTS).read_bytes()).items())
    weights = [(name, str(of.dtype), of.cpu().numpy().tobytes().hex()) for name, of in tensors]
    config = json.loads((folder / CONFIG).read_bytes())
    del config["weights_sha256"]  # of a file that holds the seconds too
    for entry in config["calibrated"]:
        if entry.get("worth") is not None:
            entry["worth"]["share"] = None
    texts = (json.dumps(weights), json.dumps(config, sort_keys=True))
    return tuple(hashlib.sha256(text.encode()).hexdigest() for text in texts)


def not_whole(folder: Path) -> list[str]:
    """What is wrong with the files that have a final name."""
    found = []
    for file in [*folder.glob("[!.]*")]:
        try:
            if file.suffix == ".safetensors":
                load(file.read_bytes())
            elif file.suffix == ".json":
                json.loads(file.read_bytes())
        except Exception as error:
            found.append(f"{file.name}: {error}"[:200])
    if (folder / CONFIG).exists():
        try:
            LesaForecaster.from_pretrained(folder)
        except LesaError as error:
            found.append(f"forecaster: {error}".replace(str(folder), "")[:200])
    return found


def _finished(command: list[str], target: Path) -> tuple[str, ...]:
    if not _killed(command, target, _never):
        raise AssertionError("the training that nobody disturbs did not end")
    return hashes(target)


def _killed(command: list[str], target: Path, when: Callable[[Any], None]) -> bool:
    """Start the command and kill it at some moment; True where it had ended by itself."""
    process = _SERVER.Process(target=_lesa, args=([*command, "--out", str(target)],))
    process.start()
    when(process)
    _kill(process)
    if process.exitcode not in (0, -9):
        raise AssertionError(f"lesa {' '.join(command)} ended with {process.exitcode}")
    return process.exitcode == 0


def _kill(process: Any) -> None:
    process.kill()
    process.join()


def _never(process: Any) -> None:
    process.join()


def _ended(process: Any) -> None:
    process.start()
    process.join()


def _nothing() -> None:
    """A process of the server's that does nothing."""


def _at_random(random: Random, seconds: float) -> Callable[[Any], None]:
    return lambda process: process.join(random.uniform(0, seconds))


def _at_a_write(random: Random, target: Path) -> Callable[[Any], None]:
    """Within a few milliseconds of the folder's first, second, ... change."""

    def wait(process: Any) -> None:
        before, left = _changes(target), random.randint(1, 6)
        while left and process.is_alive():
            if (now := _changes(target)) != before:
                before, left = now, left - 1
            time.sleep(0.0005)
        process.join(random.uniform(0, 0.005))

    return wait


def _changes(folder: Path) -> int:
    """A number that is another one after a file has come, gone or been renamed."""
    return folder.stat().st_mtime_ns if folder.exists() else 0


def _lesa(arguments: list[str]) -> None:
    """The command line, with one thread and without a word."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    from lesa.cli import app

    with open(os.devnull, "w") as silence, redirect_stdout(silence):
        app(arguments, standalone_mode=False)


def _save_forever(folder: str) -> None:
    both = older(1), older(2)
    while True:
        for forecaster in both:
            forecaster.save_pretrained(folder)
