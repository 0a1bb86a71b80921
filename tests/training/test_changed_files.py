"""Randomly changed files of forecasters and statistics work, or are told in one sentence."""

import hashlib
import json
import time
import traceback
import warnings
from collections import Counter
from random import Random

import pytest
import torch
from file_mutations import (
    bytes_changed,
    header_changed,
    json_changed,
    metadata_changed,
    tensors_changed,
)
from shaken_forecasters import PLAN, SIGMAS, levels, random_rows, shaken
from typer.testing import CliRunner

from lesa import LesaError, LesaForecaster
from lesa.cli import app
from lesa.core.schedule import Schedule
from lesa.training.search import search_schedule
from lesa.training.statistics import Statistics, inner_products

CONFIG, WEIGHTS, STATISTICS = "config.json", "model.safetensors", "statistics-6.safetensors"
SLOW = 10.0  # seconds; hostile sizes would take more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A forecaster with all that a folder can hold, and statistics beside it."""
    made = tmp_path_factory.mktemp("fuzz")
    forecaster = shaken(history=2, hidden=(4,), branches=("cond", "uncond"))
    forecaster.metadata = {
        "model_class": "M", "model_id": "a/b", "model_hash": "c", "scheduler": "E", "noise": False,
        "prompts": 3, "prompts_sha256": "d", "seed": 0, "call": {"guidance_scale": 3.5},
    }  # fmt: skip
    for branch in forecaster.branches:
        rows = random_rows(forecaster)
        forecaster.correct(PLAN, SIGMAS, branch, rows, split=torch.stack([rows, rows], -1))
    forecaster.recommend(Schedule.every(4, 28), levels(28))
    values = torch.randn(100, 300, dtype=torch.float64)
    forecaster.moments.keep(SIGMAS, {"cond": values @ values.T}, latent=True)
    forecaster.save_pretrained(made)
    statistics = Statistics(levels(6), "output", 7, {"cond": 1, "uncond": 1}, setting="a")
    basis = torch.randn(statistics.joint_size, 300, dtype=torch.float64)
    basis[-1] = 1
    statistics.extend(inner_products(basis)[None], ["a prompt"])
    statistics.save(made / STATISTICS)
    return made


def changed(random, files):
    """One file with one or two changes; the name, what was done, all files."""
    name = random.choices((CONFIG, WEIGHTS, STATISTICS), (3, 3, 2))[0]
    data, kinds = files[name], []
    for _ in range(random.choice((1, 1, 2))):
        try:
            kind, data = _change(random, name, data)
        except Exception:  # a second change finds nothing to change in what the first one left
            break
        kinds.append(kind)
    files = {**files, name: data}
    if name == WEIGHTS and random.random() < 0.9:
        config = json.loads(files[CONFIG])
        config["weights_sha256"] = hashlib.sha256(data).hexdigest()
        files[CONFIG] = json.dumps(config).encode()
    return name, kinds, files


def _change(random, name, data):
    if name == CONFIG:
        if random.random() < 0.2:
            return bytes_changed(random, data)
        kind, text = json_changed(random, data.decode())
        return kind, text.encode()
    kinds = [bytes_changed, header_changed, tensors_changed, tensors_changed]
    kinds += [lambda r, d: metadata_changed(r, d, "lesa")] * 3
    return random.choice(kinds)(random, data)


def use(folder, name):
    """All that reads the file."""
    if name == STATISTICS:
        found = Statistics.load(folder / STATISTICS)
        search_schedule(found, min(3, found.num_steps))
        assert found.joint.isfinite().all()
        return
    forecaster = LesaForecaster.from_pretrained(folder)
    forecaster.check_model("M", model_hash="c")
    for steps in (12, 50):
        at = levels(steps)
        plan = forecaster.schedule_for(5, steps, at)
        forecaster.mismatch(plan, at, "E")
        for branch in forecaster.branches:
            table = forecaster.table(plan, at, branch)
            assert table.coefficients.abs().sum(1).max() < 1e5


def check_sentence(error):
    told = str(error)
    assert told.isprintable() and 10 < len(told) < 1000, ascii(told[:300])


def check_command(folder, *options):
    """The same from the command line: what there is, or exit status 2."""
    result = CliRunner().invoke(app, ["inspect", str(folder), *options])
    assert result.exit_code in (0, 2) and "Traceback" not in result.output, result.exception
    if options and result.exit_code == 0:
        json.loads(result.stdout)


def one(folder, name, number):
    """How one changed file ended; what is wrong is raised."""
    try:
        use(folder, name)
        ended = "works"
    except LesaError as error:
        check_sentence(error)
        ended = "sentence"
    if number % 4 == 0:
        check_command(folder, *(["--json", "-"] * (number % 8 == 0)))
    return ended


def fuzz(folder, count, seed):
    """How often what happened, and the faults with what makes them again."""
    files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS, STATISTICS)}
    ended, faults = Counter(), []
    for number in range(count):
        name, kinds, mutated = changed(Random(f"{seed}.{number}"), files)
        for file, data in mutated.items():
            (folder / file).write_bytes(data)
        begun, fault = time.monotonic(), None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ended[one(folder, name, number)] += 1
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            fault = f"{at.filename.rpartition('/')[2]}:{at.lineno} {repr(error)[:300]}"
        if time.monotonic() - begun > SLOW:
            fault = f"{time.monotonic() - begun:.0f} s, {fault}"
        if fault is not None:
            faults.append((f"{seed}.{number}", name, kinds, fault))
    for file, data in files.items():
        (folder / file).write_bytes(data)
    return ended, faults


def test_changed_files_work_or_are_told(folder):
    ended, faults = fuzz(folder, 200, seed=0)
    assert not faults
    assert ended["works"] > 10 and ended["sentence"] > 100  # it reaches both


@pytest.mark.slow
def test_many_changed_files_work_or_are_told(folder):
    ended, faults = fuzz(folder, 2000, seed=1)
    print(dict(ended))
    assert not faults
