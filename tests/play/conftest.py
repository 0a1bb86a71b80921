"""A small run of the embedded FLUX for the page: 6 steps."""

from __future__ import annotations

from typing import Any

import pytest

import lesa
from lesa import testbed
from lesa.play.counts import counts_of
from lesa.play.player import Player

STEPS = 6


@pytest.fixture(scope="session")
def played_pipe() -> Any:
    return testbed.load()


@pytest.fixture
def player(played_pipe) -> Any:
    """Without anything kept, and with a forecaster that takes any number of full steps."""
    forecaster, settings = lesa.Prior(), testbed.settings() | {"num_inference_steps": STEPS}
    yield Player(played_pipe, forecaster, settings, counts_of(forecaster, STEPS))
    lesa.disable(played_pipe)
