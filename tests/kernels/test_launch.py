"""Prepared launches against ordinary ones, on a stand-in for the driver: compiled, not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from lesa_kernels.examples import examples
from lesa_kernels.launch import Launch, on_device
from lesa_kernels.mix import mix, prepare_mix

from lesa.errors import LesaError


@cache
def written_down():
    here = Path(__file__).parent
    root = here.parents[1]
    path = os.pathsep.join(map(str, (root, root / "kernels", here)))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, here / "standin.py"],
        env={**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_a_prepared_launch_hands_over_what_the_ordinary_one_does():
    rows = written_down()
    assert len(rows) >= 17
    assert {
        name: row for name, row in rows.items() if not row["same"] or row["launches"] != 1
    } == {}


def test_only_what_is_unlike_the_last_form_is_checked_again():
    checked = {name for name, row in written_down().items() if row["checked"]}
    assert checked == {
        "first", "odd result", "odd latent", "into the ring", "a step of 64 bits",
        "modulated, first", "with its feature", "its feature into the ring", "gated, first",
    }  # fmt: skip


def test_it_writes_what_the_ordinary_launch_writes(rand, integers, poisoned):
    ring, table, latent = rand(3, 4, 16), rand(5, 3), rand(4, 16)
    prepared, slots = prepare_mix(ring, table), integers(2, 0)
    for step in (integers(1), integers(4)):
        out = poisoned(4, 16)
        prepared(slots, step, out, latent)
        assert torch.equal(out, mix(ring, slots, table, step, poisoned(4, 16), latent=latent))
    with pytest.raises(LesaError, match=r"out has shape|ring has shape"):
        prepared(slots, integers(1), poisoned(4, 8), latent)


@pytest.mark.parametrize("name", examples((1, 4, 32), fill=torch.empty))
def test_every_launcher_minds_the_device(name, device, monkeypatch):
    original, seen = Launch.run, []
    monkeypatch.setattr(Launch, "run", lambda self: seen.append(self.device) or original(self))
    example = examples((1, 4, 32), device=device)[name]
    example.run()
    assert seen == [example.result.device]


def test_a_launch_goes_to_the_device_of_its_tensors(monkeypatch):
    current, seen = [0], []

    class Switch:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *exception):
            current[0] = self.before

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: seen.append(current[0])

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Switch)
    for index in (1, 0):
        Launch(Kernel(), (1,), torch.device("cuda", index), 4, (), {}).run()
    assert (seen, current) == ([1, 0], [0])
    assert on_device(torch.device("cpu")) is on_device(torch.device("cuda", 0))
