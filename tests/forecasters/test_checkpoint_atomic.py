"""Saving over a forecaster: killed between any two calls to the system, the folder still loads."""

import errno
import hashlib
import json
import os
import stat
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from shaken_forecasters import PLAN, SIGMAS, random_rows, shaken

from lesa.errors import LesaError
from lesa.forecasters import LesaForecaster

CALLS = ("mkdir", "open", "write", "fsync", "chmod", "replace", "unlink", "rename", "link")


class Killed(BaseException):
    """No `except` of a program sees the signal that this stands for."""


class Killer:
    """Stops at the n-th call to the system of those that change files, and at all later ones."""

    def __init__(self, monkeypatch, last):
        self.calls, self.last = 0, last
        for name in CALLS:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, call):
        def counted(*args, **kwargs):
            self.calls += 1
            if self.calls > self.last:
                raise Killed
            return call(*args, **kwargs)

        return counted


def made(history):
    forecaster = shaken(history=history, metadata={"seed": history})
    forecaster.correct(PLAN, SIGMAS, "cond", random_rows(forecaster))
    return forecaster


def loaded(folder):
    """The history of the forecaster in a folder, whose rows and settings belong together."""
    found = LesaForecaster.from_pretrained(folder)
    assert found.metadata["seed"] == found.settings.history
    rows = found.table(PLAN, SIGMAS).coefficients
    assert rows.shape[1] == found.settings.history + 1
    return found.settings.history


def test_killed_between_any_two_calls_it_is_the_old_one_or_the_new(tmp_path, monkeypatch):
    old, new = made(2), made(4)
    seen, last = [], 0
    while not seen or seen[-1] is not None:
        folder = tmp_path / str(last)
        old.save_pretrained(folder)
        (folder / "notes.txt").write_text("mine")
        with monkeypatch.context() as patched:
            killer = Killer(patched, last)
            try:
                new.save_pretrained(folder)
                seen.append(None)
            except Killed:
                assert killer.calls > last
                seen.append(0)
        seen[-1] = None if seen[-1] is None else loaded(folder)
        assert loaded(folder) in (2, 4) and (folder / "notes.txt").read_text() == "mine"
        last += 1
    assert loaded(folder) == 4
    states = [history for history in seen if history is not None]
    assert states == sorted(states) and set(states) == {2, 4} and len(states) >= 5


def test_a_reader_beside_a_writer_never_sees_a_mixture(tmp_path):
    both = made(2), made(4)
    both[0].save_pretrained(tmp_path)
    found, stop = set(), threading.Event()

    def read():
        while not stop.is_set():
            found.add(loaded(tmp_path))

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(1000):
        both[turn % 2].save_pretrained(tmp_path)
        if turn > 40 and len(found) == 2:
            break
    stop.set()
    reader.join()
    assert found == {2, 4}


def test_weights_beside_a_config_of_others_must_be_whole(tmp_path):
    """A pair that a saving left half replaced is one thing, damaged weights are another."""
    old, new = made(2), made(4)
    old.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_bytes()
    new.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(config)
    assert loaded(tmp_path) == 4
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(LesaError, match=r"model\.safetensors.*truncated or altered"):
        LesaForecaster.from_pretrained(tmp_path)


def test_a_folder_of_an_earlier_version_loads(tmp_path):
    """Its weights hold no config of their own."""
    made(2).save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    save_file(load_file(weights), weights)
    told = json.loads(config.read_text())
    told["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    config.write_text(json.dumps(told))
    assert loaded(tmp_path) == 2
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(LesaError, match=r"model\.safetensors.*truncated or altered"):
        LesaForecaster.from_pretrained(tmp_path)


def test_permissions_follow_the_mask_or_stay(tmp_path):
    before = os.umask(0o027)
    try:
        made(2).save_pretrained(tmp_path / "new")
        (tmp_path / "new" / "config.json").chmod(0o600)
        made(4).save_pretrained(tmp_path / "new")
        modes = {
            path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()
        }
        assert modes == {"config.json": 0o600, "model.safetensors": 0o640}
    finally:
        os.umask(before)


@pytest.mark.parametrize("folder", ["", None, 3, b"bytes", "null\0byte", torch.ones(2)], ids=repr)
def test_what_is_no_folder_is_told(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LesaError, match="^folder=.*: not a path"):
        LesaForecaster().save_pretrained(folder)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_forecaster(tmp_path, monkeypatch, code):
    made(2).save_pretrained(tmp_path)

    def full(*args):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(LesaError, match=f"cannot be written .{os.strerror(code)}"):
            made(4).save_pretrained(tmp_path)
    assert loaded(tmp_path) == 2 and len([*tmp_path.iterdir()]) == 2


def test_metadata_that_are_not_finite_are_saved_all_the_same(tmp_path):
    LesaForecaster(metadata={"call": {"scale": float("inf")}}).save_pretrained(tmp_path)
    assert LesaForecaster.from_pretrained(tmp_path).metadata == {"call": {"scale": None}}
