"""Threads that share a denoiser, and forks among them; benchmarks/soak.py has the long form."""

from __future__ import annotations

import os

import pytest
import soak_threads


def test_pictures_of_many_threads_are_those_of_one():
    found = soak_threads.threads(3, 3, 2, seed=1)
    assert found == {"threads": 3, "runs": 18, "differ": [], "fallbacks": {}}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_children_forked_among_threads_make_their_own_pictures():
    assert soak_threads.forks(4, seed=1)["ended"] == {"equal": 4}
