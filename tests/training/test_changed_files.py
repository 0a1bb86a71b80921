"""Randomly changed files of forecasters and statistics work, or are told in one sentence."""

from __future__ import annotations

import time

import file_fuzz
import fuzzed_folders
import pytest
from file_fuzz import CONFIG, STATISTICS, WEIGHTS

FOLDERS = {"full": fuzzed_folders.full, "trained": fuzzed_folders.trained}


@pytest.mark.parametrize("made, count", [("full", 150), ("trained", 60)])
def test_changed_files_work_or_are_told(made, count, tmp_path):
    fuzz = FOLDERS[made](tmp_path).run(count)
    assert fuzz.faults == []
    names = {kind.partition(":")[0] for kind, _ in fuzz.ended}
    assert names == {CONFIG, WEIGHTS, STATISTICS}
    found = fuzz.to_dict()["ended"]
    assert found["works"] > 10 and found["sentence"] > count / 2  # it reaches both


@pytest.mark.slow
@pytest.mark.parametrize("made", FOLDERS)
def test_many_changed_files_work_or_are_told(made, tmp_path):
    fuzz = FOLDERS[made](tmp_path).run(2000, seed=1)
    print(fuzz.to_dict()["ended"])
    assert fuzz.faults == []


@pytest.mark.parametrize("fault", ["ValueError", "TooSlow", "not finite"])
def test_a_fault_is_found_and_made_again_from_its_seed(fault, tmp_path, monkeypatch):
    def use(forecaster):
        if fault == "ValueError":
            raise ValueError("a fault")
        if fault == "TooSlow":
            time.sleep(30)
        return fault, "what was seen"

    if fault == "TooSlow":
        monkeypatch.setattr(file_fuzz, "SLOW", 3.0)
    fuzz = fuzzed_folders.full(tmp_path)
    fuzz.accelerated = use
    fuzz.run(12, seed=4)
    assert fault in {found["ended"] for found in fuzz.faults}
    assert fuzz.one(fuzz.faults[0]["seed"]) == fault
