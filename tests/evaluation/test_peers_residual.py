"""SenCache, DiCache and TC-Pade against their formulas, on tiny real pipelines."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from lesa.core.schedule import Schedule
from lesa.evaluation.peers.dicache import dicache, scale
from lesa.evaluation.peers.residual import residual_reuse
from lesa.evaluation.peers.sencache import sencache
from lesa.evaluation.peers.sensitivity import Sensitivity, sensitivities
from lesa.evaluation.peers.tc_pade import forecast, full_steps, nearest, rational, tc_pade
from lesa.hooks.wrappers import core_of
from tests.evaluation.block_calls import PIPELINES, STEPS, applied, close, make_case
from tests.tiny_pipelines import build, run


@pytest.fixture(scope="module", params=PIPELINES)
def case(request):
    return make_case(request.param)


def test_the_residual_is_reused_on_a_list(case):
    result, branches, use = applied(case, residual_reuse(Schedule.explicit((0, 3, 4), STEPS)))
    for calls in branches:
        assert [call.full for call in calls] == [step in (0, 3, 4) for step in range(STEPS)]
        for step, source in {1: 0, 2: 0, 5: 4, 7: 4}.items():
            close(calls[step].h, calls[step].x + calls[source].h - calls[source].x)
    assert use.full_steps() == 3 and use.cache_bytes() > 0
    assert not torch.equal(result, case.plain)


def test_everything_full_is_the_plain_run(case):
    every = Schedule.every(1, STEPS)
    known = {branch: [Sensitivity(1, 1)] * STEPS for branch in sensitivities(case.bench)}
    for manager in (
        residual_reuse(every),
        tc_pade(every),
        sencache(0.0, known, STEPS),
        lambda pipe: dicache(pipe, 0.0),
    ):
        result, _, use = applied(case, manager)
        assert torch.equal(result, case.plain) and use.full_steps() == STEPS


def test_tc_pade_forecasts_from_its_own_residuals(case):
    """In float64 from the watched tokens alone: every step's residual enters the history."""
    schedule = Schedule.explicit((0, 1, 5), STEPS)
    _, branches, use = applied(case, tc_pade(schedule))
    assert use.full_steps() == 3
    for calls in branches:
        for step in schedule.skipped_steps:
            past = [calls[step - k].h - calls[step - k].x for k in (1, 2)]
            moved = calls[step].x - calls[step - 1].x
            made = calls[step].x + forecast(past, step / STEPS) + 0.2 * moved
            close(calls[step].h, made)


def test_the_rational_forecast():
    """Of equal residuals themselves; of r1 = 2, r2 = 1 by hand; never far from recent ones."""
    same = torch.tensor([2.0, -3.0], dtype=torch.float64)
    assert forecast([same], 0.5) is same
    close(rational(same, same), same * (1 + 0.1))  # (2 - 1) / 0.9, clamped to a tenth
    newest, older = (torch.tensor([v], dtype=torch.float64) for v in (2.0, 1.0))
    g = math.exp(-5 / 1.5)
    pushed = max(min((4 - 1) * g / (1 - 0.1 * g) - 1.6, 0.5), -0.5)
    close(rational(newest, older), torch.tensor([1.6 + (0.7 * g + 0.3) * pushed]).double())
    close(forecast([newest, older], 0.3), torch.tensor([1.9]).double())
    late = forecast([newest, older], 0.81) - forecast([newest, older], 0.8)
    close(late, torch.tensor([0.3]).double())


def test_the_rule_of_tc_pade():
    assert full_steps(8, 5, 50) == [0, 1, 2, 3, 4, 8, 16, 24, 32, 40, 48, 49]
    assert nearest(12, 50).full_steps == (0, 1, 2, 3, 4, 8, 16, 24, 32, 40, 48, 49)
    for steps in (4, 8, 50):
        for wanted in range(1, steps + 1):
            assert len(nearest(wanted, steps).full_steps) >= wanted
    assert [nearest(n, 50).full_steps for n in (1, 2)] == [(0,), (0, 49)]


def test_sensitivities_are_those_of_the_model(case):
    """Against the model called by hand on a step's and the next one's latent and time."""
    calls, core = [], core_of(case.pipe.transformer)

    def note(_, args, kwargs, output):
        calls.append((kwargs, output[0]))

    handle = core.register_forward_hook(note, with_kwargs=True)
    settings = {**case.bench.settings, "num_inference_steps": STEPS}
    run(case.pipe, settings | {"generator": torch.Generator().manual_seed(0)})
    handle.remove()
    known = sensitivities(case.bench)
    for place, found in enumerate(known.values()):
        own = calls[place :: len(known)]
        assert len(found) == STEPS and found[-1] == found[-2]
        (before, output), (after, _) = own[2], own[3]
        with torch.no_grad():
            for name, told in zip(("hidden_states", "timestep"), found[2], strict=True):
                moved = core(**{**before, name: after[name]})[0] - output
                change = (after[name] - before[name]).double()
                size = change.norm() if name == "hidden_states" else change.abs().max()
                assert told == pytest.approx(float(moved.double().norm() / size), rel=1e-3)


def test_sencache_skips_while_little_is_expected(case):
    """With a_x = 0 and a_t = 1 the expected change is that of the time alone."""
    known = {branch: [Sensitivity(0, 1)] * STEPS for branch in sensitivities(case.bench)}
    times, size = [], []

    def note(_, args, kwargs):
        times.append(float(kwargs["timestep"].flatten()[0]))
        size.append(kwargs["hidden_states"].numel() ** 0.5)

    handle = case.pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    run(case.pipe, case.call())
    handle.remove()
    own = times[:: len(times) // STEPS]
    for longest in (STEPS, 1):
        threshold = (own[1] - own[4]) / size[0]
        expected, last = [], None
        for step, time in enumerate(own):
            skipped = last is not None and step - last <= longest
            if not skipped or (own[last] - time) / size[0] >= threshold:
                last = step
            expected.append(last == step)
        _, branches, use = applied(case, sencache(threshold, known, longest))
        for calls in branches:
            assert [call.full for call in calls] == expected
            assert 1 < sum(expected) < STEPS
        assert use.full_steps() == sum(expected)
    for calls in branches:  # the last manager skipped every other step at most
        close(calls[1].h, calls[1].x + calls[0].h - calls[0].x)


def change(new, old):
    return float((new - old).abs().mean() / old.abs().mean())


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_dicache_is_its_formula(case, share):
    """Every decision and forecast again from the watched tokens, in float64."""
    changes = []
    _, branches, _ = applied(case, lambda pipe: dicache(pipe, 1e9))
    for a, b in zip(branches[0], branches[0][1:], strict=False):
        changes.append(abs(change(b.y, a.y) - change(b.x, a.x)))
    threshold = share * sum(changes)
    _, branches, use = applied(case, lambda pipe: dicache(pipe, threshold))
    for calls in branches:
        distance, past = 0.0, []
        for step, now in enumerate(calls):
            if step:
                before = calls[step - 1]
                distance += abs(change(now.y, before.y) - change(now.x, before.x))
            if step in (0, STEPS - 1) or distance >= threshold:
                assert now.full
                distance, past = 0.0, [(now.h - now.x, now.y - now.x), *past[:1]]
                continue
            assert not now.full
            (r1, q1), (r2, q2) = past[0], past[-1]
            added = r1
            if len(past) == 2:
                q = now.y - now.x
                g = float((q - q2).abs().mean() / (q1 - q2).abs().mean())
                added = r2 + min(max(g, 1), 1.5) * (r1 - r2)
            close(now.h, now.x + added)
    counted = sum(call.full for calls in branches for call in calls) / len(branches)
    assert use.full_steps() == counted < STEPS
    assert use.cache_bytes() > 0


def test_a_forward_that_a_block_had_before_is_back_afterwards():
    """As accelerate's, which brings the weights of an offloaded block."""
    pipe, call = build("flux")
    block, calls = pipe.transformer.transformer_blocks[0], []
    plain = block.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    counted.__signature__ = inspect.signature(plain)
    block.forward = counted
    with dicache(pipe, 1e9):
        run(pipe, call())
    assert len(calls) == 6 * 2 and block.forward is counted  # steps, guidance branches


def test_the_scale_is_a_share_of_the_way():
    older, newest = torch.zeros(3), torch.ones(3)
    assert [scale(torch.full((3,), v), [newest, older]) for v in (0.2, 1.3, 4.0)] == pytest.approx(
        [1.0, 1.3, 1.5]
    )
