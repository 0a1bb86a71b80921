"""The plain run is kept: no phase after the collection runs it again, and none finds another."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from training_jobs import STEPS, make_job, reuse

from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.training import base_run
from lesa.training.base_run import BaseRun
from lesa.training.closed_loop import run_rollouts
from lesa.training.collect import collect
from lesa.training.rollout import Rollout, RolloutSpec

PLANS = [Schedule.explicit((0, 2, 4), STEPS), Schedule.explicit((0, 3), STEPS)]


def fitted(job, statistics):
    rollouts = [Rollout(RolloutSpec(plan, 3, uses_latent=job.tap == "output")) for plan in PLANS]
    before = job.work.rows
    width = 4 if job.tap == "output" else 3
    run_rollouts(job, rollouts, reuse(width), STEPS, statistics)
    return rollouts, job.kept_base(STEPS).final, job.work.rows - before


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("name", "more"),
    [("qwen", {}), ("sdxl", {"num_images_per_prompt": 2}), ("flux", {"tap": "hidden"})],
)
def test_fits_against_the_kept_run_are_those_against_the_run_itself(
    name, more, mapped, monkeypatch, tmp_path
):
    if mapped:
        monkeypatch.setattr(base_run, "SHARE", 0.0)
    tap = {"tap": more.pop("tap")} if "tap" in more else {}
    job = make_job(name, **more)
    for field, value in {**tap, "folder": tmp_path}.items():
        object.__setattr__(job, field, value)
    statistics = collect(job, STEPS)
    kept, base, rows = fitted(job, statistics)
    full = sum(len(plan.full_steps) for plan in PLANS) - 1  # step 0 of both is one
    probe = STEPS * (job.tap == "hidden") / len(job.prompts)
    assert rows == job.rows(full)
    job.work.bases.clear()  # of a job that has not collected: it is run once more, and kept
    again, same, more_rows = fitted(job, statistics)
    assert more_rows == job.rows(full + STEPS + probe)
    assert fitted(job, statistics)[2] == job.rows(full)
    torch.testing.assert_close(base, same, rtol=1e-4, atol=1e-5)
    for one, other in zip(kept, again, strict=True):
        for branch, found in one.result.coefficients.items():
            wanted = other.result.coefficients[branch]
            # behind a tail of random weights nearly every row does: there the score has to tell
            if job.tap == "output":
                torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(one.result.score, other.result.score, rtol=0, atol=0.05)
    if mapped:  # the file has no name any more, or none but statistics would be in the folder
        assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}


@pytest.mark.parametrize("share", [0.25, 0.0])
def test_what_is_put_is_there(share, monkeypatch):
    monkeypatch.setattr(base_run, "SHARE", share)
    run = BaseRun(steps=3, pictures=4)
    latents, outputs = torch.randn(3, 4, 2, 5), torch.randn(3, 2, 4, 2, 5).bfloat16()
    for step in range(3):
        for pictures in (range(0, 3), [3]):
            at = list(pictures)
            run.put(step, "cond", pictures, latents[step, at], outputs[step][:, at])
    latent, output = run.at(1, "cond", [3, 0], torch.device("cpu"))
    assert torch.equal(latent, latents[1, [3, 0]]) and output.dtype == torch.bfloat16
    assert torch.equal(output, outputs[1][:, [3, 0]])
    assert run.nbytes == latents.nbytes + outputs.nbytes


def test_every_number_of_steps_is_kept():
    job = make_job("flux")
    for steps in (STEPS + 1, STEPS):
        collect(job, steps)
    before = job.work.rows
    for steps in (STEPS + 1, STEPS):
        rollout = Rollout(RolloutSpec(Schedule.explicit((0, 2, 4), steps), 3))
        run_rollouts(job, [rollout], reuse(4), steps)
    assert job.work.rows - before == job.rows(2 * 3)


def test_a_disk_without_room_for_the_plain_run_is_told_first(monkeypatch, tmp_path):
    """A mapped file on a full disk ends the process at the first page that finds no room."""

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(base_run, "SHARE", 0.0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    kept = BaseRun(STEPS, 1, tmp_path)
    with pytest.raises(LesaError, match="no room for 0.0 GB of the plain run .No space left"):
        kept.put(0, "cond", [0], torch.ones(1, 4), torch.ones(1, 1, 4))
    assert not [*tmp_path.iterdir()]
