"""Runs that begin late, from a picture: fewer steps than the pipeline is asked for."""

from __future__ import annotations

import torch
from tiny_pipelines import build_img2img

from lesa.core.schedule import Schedule
from lesa.training.closed_loop import replay, run_rollouts
from lesa.training.collect import collect
from lesa.training.job import Job
from lesa.training.rollout import Rollout, RolloutSpec

ASKED, RUN = 12, 6


def test_what_is_fitted_is_the_run_that_was_collected():
    """With `strength=0.5`: every skipped step gets rows, against the plain run of 12 steps."""
    pipe, call = build_img2img("flux")
    arguments = call(1)
    for name in ("num_inference_steps", "generator", "output_type"):
        arguments.pop(name, None)
    job = Job(pipe, ["a fox"], arguments)
    statistics = collect(job, ASKED)
    assert statistics.num_steps == RUN and job.spent == 1
    base = job.kept_base(RUN)
    assert base is not None and base.steps == ASKED
    plans = [Schedule.explicit((0, 2), RUN), Schedule.explicit(range(RUN), RUN)]
    some, every = (Rollout(RolloutSpec(plan, 2)) for plan in plans)
    prior = torch.zeros(RUN, 3, dtype=torch.float64)
    run_rollouts(job, [some, every], lambda *_: prior.clone(), RUN, statistics)
    assert job.kept_base(RUN) is base  # nothing was collected anew
    for rows in some.result.coefficients.values():
        assert rows[list(plans[0].skipped_steps)].any(1).all()
    assert every.result.score > 100 > some.result.score
    pictures = replay(job, some.fixed(), 0)
    torch.testing.assert_close(pictures[:1], job.run([0], ASKED, output_type="pt"))
