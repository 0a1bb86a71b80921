"""The bound that a report shows: tables that are fitted on the measured prompts themselves."""

from __future__ import annotations

import pytest
from training_jobs import STEPS, make

import lesa
from lesa.evaluation import Bench, build, compare
from lesa.evaluation.limit import add_limits
from lesa.util.progress import Progress


@pytest.mark.parametrize(("name", "tap"), [("chroma", "output"), ("sdxl", "hidden")])
def test_a_table_of_ones_own_is_nearer_than_one_for_others(name, tap):
    pipe, call = make(name, 2)
    call |= {"num_inference_steps": STEPS}
    options = dict(call=call, tap=tap, refine=0, polish=0, progress=False)
    trained = lesa.train(pipe, ["a", "b"], STEPS, 3, **options)
    bench = Bench(STEPS, pipe, call, forecaster=trained)
    methods = [build("fora", 3, bench), build("lesa", 3, bench)]
    result = compare(pipe, ["c", "d"], methods, call, seed=7)
    progress = Progress(quiet=True)
    add_limits(pipe, result, methods, progress)
    reuse, ours = result.rows
    assert "limit" not in reuse and len(ours["limit_psnr"]) == 2
    assert [line.split(":")[0] for line in progress.lines] == ["limit"]
    assert ours["limit"] > ours["psnr_mean"] > reuse["psnr_mean"]
    assert ours["limit"] == pytest.approx(sum(ours["limit_psnr"]) / 2)
