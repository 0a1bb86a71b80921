"""Training a pipeline whose weights are on the host between calls."""

from __future__ import annotations

from unittest import mock

import torch
from tiny_pipelines import build

from lesa.training import closed_loop
from lesa.training.job import Job


def test_room_for_runs_is_asked_of_the_device_that_computes():
    """Not of the host, where accelerate leaves the weights: the device would be filled."""
    pipe, _ = build("flux")
    assert Job(pipe, ["a"]).device == torch.device("cpu")
    there, asked = torch.device("cuda", 1), []
    job, rollout = Job(pipe, ["a"]), mock.Mock()
    rollout.spec.history = 3
    with (
        mock.patch.object(type(pipe), "_execution_device", there),
        mock.patch.object(closed_loop, "free_memory", lambda device: asked.append(device) or 1),
    ):
        assert closed_loop._groups(job, [rollout] * 2, 1) == [range(1), range(1, 2)]
    assert asked == [there]
