"""Forecasters as if trained: every parameter random, from one seed."""

from typing import Any

import torch

from lesa.core.schedule import Schedule
from lesa.forecasters import LesaForecaster

PLAN = Schedule.every(7, 50)
GATES: dict[str, dict[str, Any]] = {"ridge": {}, "edge": {"spline": "edge"}, "mlp": {"gate": "mlp"}}


def levels(steps, shift=3.0):
    """Flow times of a shifted Euler run."""
    times = [1 - s / steps for s in range(steps + 1)]
    return tuple(shift * t / (1 + (shift - 1) * t) for t in times)


SIGMAS = levels(50)


def shaken(**fields):
    """A forecaster whose parameters are all random, in fp64: as if trained."""
    forecaster = LesaForecaster(**fields).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in forecaster.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise)
    return forecaster


def random_rows(forecaster, plan=PLAN, sigmas=SIGMAS):
    rows = forecaster.table(plan, sigmas).coefficients
    return rows + 0.1 * torch.rand(rows.shape, dtype=torch.float64) * (rows != 0)
