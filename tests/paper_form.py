"""A forecaster of the paper's form with a gate that has something to say."""

from __future__ import annotations

import torch

from lesa import LesaForecaster, Schedule, Table

STEPS, FULL = 10, (0, 1, 2, 5)


def gated_table(**fields) -> Table:
    """Its table: windows of 2 and 3 features, forecasts enter the ring too."""
    forecaster = LesaForecaster(
        "paper", num_steps=STEPS, branches=("cond",), nodes=24, windows=(2, 3, 3), **fields
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in forecaster.named_parameters():
        if name.endswith(("output", "w.cond.1", "b.cond")) or ".layers." in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    sigmas = torch.linspace(1, 0, STEPS + 1).tolist()
    return forecaster.table(Schedule.explicit(FULL, STEPS), sigmas)
