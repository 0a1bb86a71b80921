"""DPCache and MeanCache against their formulas, and their lists against all lists."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch

import lesa
from lesa.core.schedule import Schedule
from lesa.evaluation.method import Bench
from lesa.evaluation.peers.dpcache import (
    PLANNED,
    line_errors,
    longest_gap,
    plan,
    transition_costs,
)
from lesa.evaluation.peers.meancache import (
    AVERAGED,
    SPANS,
    MeanCache,
    edge_costs,
    shortest_path,
)
from lesa.evaluation.peers.trajectories import Trajectory, Trial, trajectories
from lesa.forecasters.taylor import Taylor
from tests.tiny_pipelines import build

STEPS = 9


def draw(*shape):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def bench(name="flux", steps=STEPS):
    pipe, call = build(name)
    settings = {key: value for key, value in call().items() if key != "generator"}
    return Bench(steps, pipe, settings, ("a title",))


def test_the_errors_are_those_of_taylor_on_every_pair():
    features = draw(STEPS, 12).cumsum(0)
    errors = line_errors(features, STEPS)
    for i, j, t in combinations(range(STEPS), 3):
        table = Taylor(1).table(Schedule.explicit((0, i, j), STEPS))
        line = table.apply([features[j], features[i]], t)
        assert errors[i, j, t] == pytest.approx(float((line - features[t]).abs().mean()))
    assert not line_errors(torch.arange(STEPS).double()[:, None] * draw(12), STEPS).gt(1e-12).any()


def cost(costs, full, steps):
    return sum(
        float(costs[triple]) for triple in zip(full, full[1:], [*full[2:], steps], strict=False)
    )


@pytest.mark.parametrize("wanted", [3, 4, 5, 7, STEPS])
def test_the_plan_is_the_best_of_all_lists(wanted):
    errors = line_errors(draw(STEPS, 12).cumsum(0), STEPS)
    costs = transition_costs(errors, longest_gap(STEPS, wanted))
    lists = [(0, 1, 2, *rest) for rest in combinations(range(3, STEPS), wanted - 3)]
    best = min(lists, key=lambda full: cost(costs, full, STEPS))
    assert plan(errors, wanted) == best


def test_few_full_steps_lead_and_gaps_are_capped():
    errors = line_errors(draw(50, 4), 50)
    assert [plan(errors, wanted) for wanted in (1, 2, 3)] == [(0,), (0, 1), (0, 1, 2)]
    assert (longest_gap(50, 10), longest_gap(50, 4), longest_gap(50, 3)) == (20, 24, 48)
    flat = plan(torch.zeros(50, 50, 50, dtype=torch.float64), 6)
    assert max(b - a for a, b in pairwise([*flat, 50])) <= 20


def euler(levels, velocities, start):
    """The latents that the velocities lead to, [S + 1, N]."""
    moves = levels.diff()[:, None] * velocities
    return torch.cat([start[None], start + moves.cumsum(0)])


@pytest.mark.parametrize("span", SPANS)
def test_meancache_forecasts_as_a_loop_over_latents(span):
    """The rule step by step, with the latents that its own forecasts lead to."""
    levels = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64) ** 1.5
    schedule, true = Schedule.explicit((0, 1, 4, 6), STEPS), draw(STEPS, 5)
    spans = torch.full((STEPS, STEPS + 1), span)
    table = MeanCache(spans).table(schedule, levels.tolist())
    known, latents = [], [draw(5)]
    for step in range(STEPS):
        if schedule.is_full(step):
            known.append(true[step])
        else:
            first = max(0, step - span)
            between = levels[step] - levels[first]
            average = (latents[step] - latents[first]) / between
            change = (known[first] - average) / between
            known.append(known[-1] - change * (levels[step + 1] - levels[step]))
            past = [true[p] for p in schedule.cached_before(step, 4)]
            torch.testing.assert_close(table.apply(past, step), known[-1])
        latents.append(latents[-1] + (levels[step + 1] - levels[step]) * known[-1])
    if span == 1:
        reuse = lesa.Reuse().table(schedule).coefficients
        torch.testing.assert_close(table.coefficients[:, :1], reuse)


def test_meancache_is_tied_to_its_number_of_steps():
    with pytest.raises(lesa.LesaError, match="num_steps=4, but these spans are tied to 9 steps"):
        MeanCache(torch.ones(9, 10)).table(Schedule.every(2, 4), [1, 0.75, 0.5, 0.25, 0])


def test_costs_of_a_velocity_that_is_a_line():
    """The average over a gap is then v_a + slope (sigma_b - sigma_a) / 2 in the limit of small
    steps; Euler's sums make it v_a + slope (sigma_{b-1} - sigma_a) / 2, which J misses by the same
    step both times: only reuse, K = 1, errs by half the slope."""
    levels = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    slope = draw(6)
    velocities = levels[:-1, None] * slope
    run = Trajectory(tuple(levels.tolist()), {}, euler(levels, velocities, draw(6)))
    costs, h = edge_costs(run), 1 / STEPS
    for place, span in enumerate(SPANS):
        for a, b in combinations(range(STEPS + 1), 2):
            if b == a + 1:
                assert costs[place, a, b] == 0
                continue
            seen = min(span, a + 1)  # steps in the window: its average is (seen - 1) h / 2 away
            told = (seen - 1) / seen / 2 * (b - a) * h
            wrong = abs((b - a - 1) * h / 2 - told) * slope.abs().mean()
            assert costs[place, a, b] == pytest.approx(float(wrong), abs=1e-12)


def test_meancache_needs_the_latents_to_the_end():
    outputs = {"cond": draw(STEPS, 2)}
    with pytest.raises(lesa.LesaError, match="does not move one latent .* leave meancache"):
        edge_costs(Trajectory((1.0, 0.0), outputs, torch.empty(0)))


@pytest.mark.parametrize("exponent", [1, 4])
@pytest.mark.parametrize("wanted", [1, 2, 4, STEPS])
def test_the_path_is_the_shortest_of_all(wanted, exponent):
    costs = draw(STEPS, STEPS + 1).abs()
    costs[torch.arange(STEPS)[:, None] >= torch.arange(STEPS + 1)] = torch.inf
    inner = combinations(range(1, STEPS - 1), max(wanted - 2, 0))
    lists = [(0, *some, STEPS - 1) for some in inner] if wanted > 1 else [(0,)]
    best = min(lists, key=lambda full: sum(float(costs[e]) ** exponent for e in pairwise(full)))
    assert shortest_path(costs, wanted, exponent) == best


def test_batched_guidance_leaves_one_latent_of_a_picture():
    """The denoiser gets it twice; the sampler moves it by the guided velocity."""
    tools = bench("sd3")
    tools.settings["guidance_scale"] = 4.0
    (run,) = trajectories(tools, 1)
    (outputs,) = run.outputs.values()
    without, given = outputs.unflatten(1, (2, -1)).unbind(1)
    guided = without + 4.0 * (given - without)
    levels = torch.tensor(run.sigmas, dtype=torch.float64)
    expected = euler(levels, guided, run.latents[0])
    torch.testing.assert_close(run.latents, expected, rtol=1e-4, atol=1e-4)
    found = AVERAGED["meancache"].build("meancache", 5, tools, None)
    assert found.full_steps == 5


@pytest.mark.parametrize("name", ["kontext", "flux2", "z-image"])
def test_the_latents_are_the_samplers_whatever_the_denoiser_gets(name):
    """A picture in its sequence (Kontext), a final latent in another form (FLUX.2), a list."""
    tools = bench(name)
    (run,) = trajectories(tools, 1)
    assert len(run.latents) == STEPS + 1 and run.latents.diff(dim=0).abs().amax(1).gt(0).all()
    assert edge_costs(run)[0].triu(1).isfinite().all()
    assert "step" not in vars(tools.pipe.scheduler)


def test_trajectories_hold_what_the_sampler_did():
    tools = bench()
    tools.settings["true_cfg_scale"] = 1.0  # one call a step
    (run,) = trajectories(tools, 4)
    (outputs,) = run.outputs.values()
    levels = torch.tensor(run.sigmas, dtype=torch.float64)
    expected = euler(levels, outputs, run.latents[0])
    torch.testing.assert_close(run.latents, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dpcache", "meancache"])
def test_they_choose_their_own_steps_and_take_what_they_say(name):
    tools, peer = bench(), {**PLANNED, **AVERAGED}[name]
    method = peer.build(name, 5, tools, None)
    assert len(method.schedule.full_steps) == 5 and method.origin == "own"
    if name == "dpcache":
        assert method.schedule.full_steps[:3] == (0, 1, 2)
    else:
        assert method.schedule.full_steps[-1] == STEPS - 1 and "exponent" in method.note
    shared = Schedule.explicit((0, 4, 6))
    if peer.takes_lists:
        method = peer.build(name, 3, tools, shared)
        assert method.origin == "searched" and method.schedule == shared.bind(STEPS)

    def forecast(pipe):
        return lesa.accelerate(pipe, method.forecaster, schedule=method.schedule)

    def reuse(pipe):
        return lesa.accelerate(pipe, "fora", schedule=Schedule.explicit((0,), STEPS))

    trial = Trial(tools, 4)
    assert 0 < trial.error(forecast) < trial.error(reuse)


def test_who_cannot_run_says_why():
    assert "calibration" in PLANNED["dpcache"].unfit(Bench(9, build("flux")[0]))
    assert "calibration" in AVERAGED["meancache"].unfit(Bench(9))
    assert "EulerDiscreteScheduler" in AVERAGED["meancache"].unfit(bench("sdxl"))
    assert PLANNED["dpcache"].unfit(bench("sdxl")) is None
