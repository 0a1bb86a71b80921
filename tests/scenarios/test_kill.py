"""Processes that SIGKILL ends at random moments; benchmarks/soak.py has the long form."""

from __future__ import annotations

import multiprocessing

import pytest
import soak_kills
from saved_pipelines import save

from lesa import testbed

pytestmark = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)


def test_a_killed_training_ends_in_the_weights_of_an_undisturbed_one(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(testbed.captions(3, split="train")))
    command = ["train", str(tmp_path / "sd3"), *save("sd3", tmp_path / "sd3")]
    command += ["--prompts", str(prompts), "--num-inference-steps", "6", "--full-steps", "3"]
    command += ["--form", "table", "--polish", "0", "--batch-size", "1"]
    found = soak_kills.trainings(command, tmp_path / "killed", 2, most=1)
    assert found["identical"] == 2 and found["kills"] >= 1
    assert found["not whole"] == []


def test_a_folder_that_is_written_over_holds_one_forecaster_or_the_other(tmp_path):
    found = soak_kills.savings(tmp_path, 10)
    assert found["not whole"] == []
    assert set(found["ended"]) <= {"forecaster 1", "forecaster 2"}
