"""Every kernel on every backend that is there: `python -m pytest benchmarks --benchmark-only`.

Times are of one call as the engine makes it, and on a GPU of its synchronisation; `share_of_copy`
in `extra_info` is device time there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from _cases import CASES, HISTORY, SHAPES, Case, another, arguments, expected, nbytes
from _suite import LIMIT, PLACES, buffer_sets, in_turn, label, relative_error, share_of_copy

from lesa import ops

GRAM_LIMIT = 1e-5  # sums of fp32 products; the result itself is float64
RUNS = [(place, case) for case in CASES for place in PLACES if case.has(*place)]


@pytest.mark.benchmark(max_time=0.4)
@pytest.mark.parametrize(
    ("place", "case"),
    RUNS,
    indirect=["place"],
    ids=[f"{case}-{label(place)}" for place, case in RUNS],
)
def test_kernel(benchmark: Any, place: Any, case: Case) -> None:
    """Checked against float64 first, into an output that is NaN."""
    device, shape = place.device, SHAPES[case.tap][place.device.type]
    made = arguments(case, device)
    options = {key: made[key] for key in ("latent", "bias") if key in made}
    example = made["feature" if case.operator == "gram" else "out"]
    run = ops.implementation(case.operator, example, HISTORY, options)
    assert place.backend in run.__module__.replace("lesa_kernels", "triton"), "another one runs"
    run(**made)
    error = relative_error(made["out"], expected(case, made))
    assert error <= (GRAM_LIMIT if case.operator == "gram" else LIMIT)

    size = nbytes(made)
    more = 0 if benchmark.disabled else buffer_sets(size, device) - 1
    calls = [partial(run, **each) for each in (made, *(another(made) for _ in range(more)))]
    if more:
        benchmark.extra_info["share_of_copy"] = share_of_copy(calls, size, device)
    benchmark.extra_info.update(
        device=str(device), backend=place.backend, shape=list(shape), history=HISTORY,
        dtype="bfloat16", threads=torch.get_num_threads(), bytes=size, relative_error=error,
    )  # fmt: skip
    benchmark.group = f"{case} {list(shape)} on {device}"
    benchmark(in_turn(calls, device))
