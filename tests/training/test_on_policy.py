"""The paper's closed loop on what an accelerated run really visits."""

from __future__ import annotations

import torch
from training_jobs import STEPS, make_job

import lesa
from lesa.core.schedule import Schedule
from lesa.forecasters import LesaForecaster
from lesa.hooks.outputs import read_sample
from lesa.training.collect import collect
from lesa.training.fit import fit_paper
from lesa.training.on_policy import visited_gram


def outputs(job, steps):
    """What the pipeline's model answers at each call of its own."""
    seen = []
    hook = job.models[0].register_forward_hook(
        lambda _, __, out: seen.append(read_sample(out).clone())
    )
    job.run(range(len(job.prompts)), steps)
    hook.remove()
    return seen


def test_it_holds_what_the_engine_visits():
    """Features at full steps, from outside: the accelerated pipeline's outputs."""
    job = make_job("sdxl")
    plan = Schedule.explicit((0, 1, 4), STEPS)
    (branch,) = collect(job, STEPS).branches
    learned = LesaForecaster("paper", tap="output", branches=(branch,), num_steps=STEPS, nodes=8)
    torch.manual_seed(0)
    for parameter in learned.net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    sigmas = collect(job, STEPS).sigmas
    gram = visited_gram(job, learned.net, plan, sigmas, [branch])[branch]
    plain = outputs(job, STEPS)
    with lesa.accelerate(job.pipe, learned, schedule=plan):
        visited = outputs(job, STEPS)  # the model itself runs at full steps only
    vectors = torch.stack([part.float().flatten() for part in (*plain, *visited)])
    vectors = torch.cat([vectors, torch.ones_like(vectors[:1])])
    torch.testing.assert_close(gram, (vectors @ vectors.T).double(), rtol=1e-4, atol=1e-3)


def test_both_phases_use_it_and_lose_nothing():
    job = make_job("qwen")
    plan = Schedule.explicit((0, 1, 4), STEPS)
    statistics = collect(job, STEPS)
    told = []

    def decibels(on_policy):
        learned = LesaForecaster(
            "paper", tap="output", branches=statistics.branches, num_steps=STEPS, nodes=8
        )

        def visits(net):
            told.append(visited_gram(job, net, plan, statistics.sigmas, statistics.branches))
            return told[-1]

        fit_paper(learned, statistics, plan, visits if on_policy else None, iterations=100)
        plain = job.run(range(2), STEPS)
        with lesa.accelerate(job.pipe, learned, schedule=plan):
            fast = job.run(range(2), STEPS)
        return -10 * torch.log10((plain - fast).square().mean() / plain.square().mean())

    with_visits, without = decibels(True), decibels(False)
    assert len(told) == 2  # two epochs
    assert with_visits > without - 1
    size = STEPS + 3 + 1
    assert all(g.shape == (size, size) for g in told[0].values())
