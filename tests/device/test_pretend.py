"""The pretended device: what it refuses, what it notes, and that it computes what the CPU does."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


def kinds(reads):
    return [read.kind for read in reads]


@pytest.mark.parametrize(
    "meeting",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.ones(3).add_(x),
        lambda x: torch.stack([x, torch.ones(3)]),
        lambda x: x @ torch.eye(3),
        lambda x: torch.cat([x, x.to(SECOND)]),
        lambda x: x[torch.tensor([0], device=SECOND)],
        lambda x: torch.randn(3, device=FIRST, generator=torch.Generator()),
        lambda x: torch.linalg.solve(torch.eye(3), x),
    ],
)
def test_two_devices_do_not_meet(gpu, meeting):
    with pytest.raises(RuntimeError, match="device"):
        meeting(torch.ones(3, device="cuda"))


def test_numpy_is_refused(gpu):
    with pytest.raises((RuntimeError, TypeError)):
        np.asarray(torch.ones(3, device="cuda"))


def test_a_scalar_of_the_host_is_no_stranger(gpu):
    x = torch.ones(3, device="cuda")
    with gpu.watched() as reads:
        total = torch.tensor(2.0) * x + 1
    assert total.tolist() == [3, 3, 3] and not reads


@pytest.mark.parametrize(
    ("wait", "kind"),
    [
        (lambda x: x.sum().item(), "value"),
        (lambda x: float(x[0]), "value"),
        (lambda x: int(x[0]), "value"),
        (lambda x: bool(x.sum() > 0), "value"),
        (lambda x: x.tolist(), "value"),
        (lambda x: x.nonzero(), "value"),
        (lambda x: torch.equal(x, x), "value"),
        (lambda x: x.unique(), "value"),
        (lambda x: x.cpu(), "copy to the host"),
        (lambda x: torch.zeros(3).copy_(x), "copy to the host"),
        (lambda x: torch.zeros(3).to(x), "copy to the device"),
        (lambda x: x.copy_(torch.zeros(3)), "copy to the device"),
        (lambda x: torch.tensor([1.0], device=x.device), "copy to the device"),
        (lambda x: x.new_tensor([1.0]), "copy to the device"),
        (lambda x: x[[0, 2]], "index on the host"),
        (lambda x: x[torch.tensor([0])], "index on the host"),
        (lambda x: x[x > 0], "index by a mask"),
        (lambda x: torch.cuda.synchronize(), "synchronize"),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_host_is_seen_to_wait(gpu, mode, wait, kind):
    with mode():
        x = torch.ones(3, device="cuda")
        with gpu.watched() as reads:
            wait(x)
    assert kinds(reads) == [kind]


@pytest.mark.parametrize(
    "work",
    [
        lambda x: (x * 2).sum() + x.mean(),
        lambda x: x[1:].clone(),
        lambda x: x[torch.zeros(2, dtype=torch.long, device=x.device)],
        lambda x: x.masked_fill(x > 0, 1.0),
        lambda x: torch.zeros(3, device=x.device).copy_(x),
        lambda x: x.to(SECOND),
        lambda x: x[0],
        lambda x: (len(x), x.shape, x.device),
    ],
)
def test_other_work_makes_nobody_wait(gpu, work):
    x = torch.ones(3, device="cuda")
    with gpu.watched() as reads:
        work(x)
    assert not reads


def test_a_read_tells_whose_code_it_was(gpu):
    from lesa.hooks.noise_levels import own_noise_levels

    with gpu.watched("lesa") as reads:
        own_noise_levels(None, torch.tensor([1.0, 0.5, 0.0], device="cuda"))
    assert reads and {read.owner for read in reads} == {"lesa"}
    assert all(
        read.place.startswith(("hooks/noise_levels.py:", "core/checks.py:")) for read in reads
    )
    with gpu.watched("lesa") as reads:
        torch.ones(1, device="cuda").item()
    assert not reads


def test_writes_are_seen_by_who_shares_the_memory(gpu):
    x = torch.zeros(2, 3, device="cuda")
    row, version = x[1], x._version
    row.copy_(torch.ones(3, device="cuda"))
    x[0] = 2.0
    assert x.tolist() == [[2, 2, 2], [1, 1, 1]] and x._version > version
    assert row.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_modules_move_and_are_copied(gpu):
    layer = torch.nn.Linear(3, 2)
    x = torch.randn(4, 3)
    with torch.no_grad():
        expected = layer(x)
        moved = copy.deepcopy(layer).to("cuda:1")
        twin = copy.deepcopy(moved)
        moved.weight.zero_()
        found = twin(x.to("cuda:1"))
    assert isinstance(twin.weight, torch.nn.Parameter) and twin.weight.device == SECOND
    torch.testing.assert_close(found.cpu(), expected)


def launched(device):
    from lesa_kernels.mix import mix

    ring = torch.arange(6.0).reshape(2, 3).to(device)
    slots = torch.tensor([1, 0], dtype=torch.int32, device=device)
    table = torch.tensor([[2.0, -1.0]], device=device)
    step = torch.zeros((), dtype=torch.int32, device=device)
    return mix(ring, slots, table, step, torch.empty(3, device=device))


def test_a_kernel_runs_on_the_device_of_its_tensors_alone(gpu, monkeypatch):
    assert launched(SECOND).tolist() == [6, 7, 8]  # 2 (3, 4, 5) - (0, 1, 2)
    assert gpu.launches["mix", SECOND] == 1 and torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert torch.cuda.current_device() == torch.ones(1, device="cuda").device.index == 1
    monkeypatch.setattr("lesa_kernels.launch.on_device", lambda device: torch.no_grad())
    with pytest.raises(RuntimeError, match="launched on cuda:0 with tensors on cuda:1"):
        launched(SECOND)


def test_a_graph_does_its_work_again(gpu):
    x, y = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    total = x * 2 + 1
    y.copy_(total)
    graph.capture_end()
    x.fill_(5)
    graph.replay()
    assert y.tolist() == total.tolist() == [11, 11, 11]


def test_the_host_may_not_wait_while_a_graph_is_recorded(gpu):
    x = torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    try:
        with pytest.raises(RuntimeError, match="capturing"):
            x.sum().item()
    finally:
        graph.capture_end()
