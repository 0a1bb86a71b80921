"""`lesa compare --flops-only`: the operations of a published model, counted without running it."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from lesa.cli.output import say
from lesa.cli.requests import CompareRequest


def run_flops(request: CompareRequest, console: Console) -> list[dict[str, Any]]:
    """Count the operations of a published model, print the table and return its rows.

    Steps, size and frames that are not given are as in the paper.
    """
    from lesa.cli.inputs import parse_counts, quieten
    from lesa.evaluation.flops import flops_rows, published
    from lesa.evaluation.flops_table import flops_table

    assert request.model is not None  # of a request for --flops-only
    counts = None if request.full_steps is None else parse_counts(request.full_steps)
    quieten()
    rows = flops_rows(
        request.model,
        full_steps=counts,
        num_steps=request.num_inference_steps,
        height=request.height,
        width=request.width,
        frames=request.frames,
    )
    console.print(flops_table(rows))
    say(console, published(request.model).note)
    return rows
