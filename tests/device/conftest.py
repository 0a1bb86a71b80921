"""A pretended GPU for every test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

if find_spec("triton") is None or torch.cuda.is_available():  # a true device is not replaced
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    """The devices cuda:0 and cuda:1, computed on one thread: tensors are small, operators many."""
    from device.pretend_cuda import pretend_gpu  # Triton only now: tests/kernels sets it up first
    from diffusers import AutoencoderKL  # noqa: F401  first imported while pretending, it fails

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pretend_gpu() as made:
            yield made
    finally:
        torch.set_num_threads(threads)
