import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shaken_forecasters import GATES, PLAN, SIGMAS, levels, random_rows, shaken
from torch import nn

from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.forecasters import Forecaster, LesaForecaster
from lesa.forecasters.calibration import grown
from lesa.forecasters.continuous import extrapolation, fold, time_inputs
from lesa.forecasters.kan import KAN, MLP, RidgeSpline


@settings(deadline=None, max_examples=25)
@given(
    full=st.sets(st.integers(1, 29)),
    shift=st.floats(0.5, 5),
    history=st.integers(1, 5),
    form=st.sampled_from(["continuous", "table"]),
)
def test_untrained_is_first_order_extrapolation_in_sigma(full, shift, history, form):
    plan, sigmas = Schedule.explicit({0, *full}, 30), levels(30, shift)
    table = LesaForecaster(form, history=history).table(plan, sigmas)
    line = torch.tensor(sigmas, dtype=torch.float64) * 2.5 - 1
    for s in plan.skipped_steps:
        cached = plan.cached_before(s, history)
        value = table.apply(line[list(cached)], s, latent=torch.tensor(9.0))
        expected = line[s] if len(cached) > 1 else line[cached[0]]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-9)


def test_table_evaluates_the_batched_coefficients():
    forecaster = shaken()
    table = forecaster.table(PLAN, SIGMAS)
    step, cached = 20, PLAN.cached_before(20, 3)
    one = forecaster.coefficients(
        torch.tensor([SIGMAS[step]], dtype=torch.float64),
        torch.tensor([[SIGMAS[p] for p in cached]], dtype=torch.float64),
        torch.ones(1, 3, dtype=torch.bool),
    )
    torch.testing.assert_close(one[0].detach(), table.row(step), rtol=0, atol=1e-13)


def test_coefficients_are_the_stages_kan_over_the_base():
    forecaster = shaken(branches=("cond", "uncond"))
    target = torch.tensor([0.95, 0.9, 0.7, 0.5, 0.2], dtype=torch.float64)
    cached = target[:, None] + torch.tensor([0.02, 0.03, 0.05], dtype=torch.float64)
    valid = torch.ones(5, 3, dtype=torch.bool)
    got = forecaster.coefficients(target, cached, valid, "uncond").detach()
    base, inputs = extrapolation(target, cached, valid), time_inputs(target, cached, valid)
    for n, stage in enumerate([0, 1, 1, 2, 2]):
        assert forecaster.stage_of(float(target[n])) == stage
        learned = forecaster.net.experts["uncond"][stage](inputs[n : n + 1]).detach()[0]
        expected = learned + nn.functional.pad(base[n], (0, 1))
        torch.testing.assert_close(got[n], expected, rtol=0, atol=1e-12)


def test_time_inputs_stay_on_the_grid():
    times = torch.linspace(1, 0, 9, dtype=torch.float64)
    inputs = time_inputs(times[3:], times[:3].flip(0).expand(6, 3), torch.ones(6, 3).bool())
    assert inputs.abs().max() <= 1


def test_missing_features_keep_the_sum_and_get_no_weight():
    forecaster = shaken(history=4)
    target = torch.full((4,), 0.8, dtype=torch.float64)
    cached = torch.tensor([[0.85, 0.9, 0.95, 0.99]], dtype=torch.float64).repeat(4, 1)
    valid = torch.ones(4, 4).tril().bool()
    rows = forecaster.coefficients(target, cached, valid).detach()
    assert not rows[:, :4][~valid].any()
    junk = torch.where(valid, cached, torch.randn(4, 4).double())
    torch.testing.assert_close(forecaster.coefficients(target, junk, valid).detach(), rows)
    learned = torch.randn(4, 5, dtype=torch.float64)
    folded = fold(learned, valid)
    torch.testing.assert_close(folded[:, :4].sum(1), learned[:, :4].sum(1))
    assert torch.equal(folded[:, 4], learned[:, 4])
    assert torch.equal(folded[3], learned[3])


def test_gradients_reach_every_expert_of_the_branch_and_no_other():
    forecaster = shaken(branches=("cond", "uncond"))
    target = torch.tensor([0.95, 0.7, 0.2], dtype=torch.float64)
    cached = target[:, None] + torch.tensor([0.01, 0.02, 0.03], dtype=torch.float64)
    forecaster.coefficients(
        target, cached, torch.ones(3, 3).bool(), "cond"
    ).square().sum().backward()
    for expert in forecaster.net.experts["cond"]:
        assert all(p.grad is not None and p.grad.any() for p in expert.parameters())
    assert all(p.grad is None for p in forecaster.net.experts["uncond"].parameters())


@pytest.mark.parametrize("steps", [1, 4, 28, 100])
def test_one_forecaster_serves_any_step_count(steps):
    plan = Schedule.every(4, steps)
    table = shaken().table(plan, levels(steps))
    assert table.coefficients.shape == (steps, 4)


@pytest.mark.parametrize("form", ["continuous", "table"])
def test_correct_makes_table_return_exactly_the_rows(form):
    forecaster = shaken(form=form)
    rows = random_rows(forecaster)
    forecaster.correct(PLAN, SIGMAS, "cond", rows)
    assert torch.equal(forecaster.table(PLAN, SIGMAS).coefficients, rows)
    nearly = [sigma + 9e-5 * (0 < sigma < 1) for sigma in SIGMAS]
    assert torch.equal(forecaster.table(PLAN, nearly).coefficients, rows)
    assert forecaster.calibrated == [PLAN]


def test_rows_are_exact_only_for_their_own_list_sigmas_and_branch():
    forecaster = shaken(branches=("cond", "uncond"))
    plain = copy.deepcopy(forecaster)
    rows = random_rows(forecaster)
    forecaster.correct(PLAN, SIGMAS, "cond", rows)
    for elsewhere in ((Schedule.every(10, 50), SIGMAS), (PLAN, levels(50, shift=3.1))):
        assert not torch.equal(forecaster.table(*elsewhere, "cond").coefficients, rows)
    same = plain.table(PLAN, SIGMAS, "uncond").coefficients
    assert torch.equal(forecaster.table(PLAN, SIGMAS, "uncond").coefficients, same)


def test_correct_again_replaces_and_recommend_keeps():
    forecaster = LesaForecaster()
    for _ in range(2):
        rows = random_rows(forecaster)
        forecaster.correct(PLAN, SIGMAS, "cond", rows)
    forecaster.recommend(PLAN, SIGMAS)
    assert len(forecaster.calibrations) == 1
    assert torch.equal(forecaster.table(PLAN, SIGMAS).coefficients, rows)


def test_schedule_for():
    forecaster = LesaForecaster()
    searched = Schedule.explicit((0, 3, 11, 19, 27, 34, 40, 44, 47, 49), 50)
    forecaster.recommend(searched, SIGMAS)
    forecaster.recommend(Schedule.explicit((0, 1, 5, 9, 13, 17, 20, 23, 25, 27), 28), levels(28))
    forecaster.recommend(Schedule.every(10, 50), SIGMAS)
    assert forecaster.schedule_for(10, 50) == searched
    assert forecaster.schedule_for(10, 28).full_steps[2] == 5
    assert forecaster.schedule_for(8, 50) == Schedule.every(10, 50)
    by_fraction = forecaster.schedule_for(10, 100)
    assert by_fraction.full_steps == (0, 6, 22, 38, 54, 68, 80, 88, 94, 98)
    assert forecaster.schedule_for(10, 100, levels(100)) == by_fraction
    other = forecaster.schedule_for(10, 100, levels(100, shift=1.0))
    for here, there in zip(searched.full_steps, other.full_steps, strict=True):
        assert abs(levels(100, shift=1.0)[there] - SIGMAS[here]) <= 0.011


def test_schedule_for_other_levels_of_as_many_steps_goes_by_level():
    forecaster, plan = LesaForecaster(), Schedule.explicit(range(0, 50, 7), 50)
    forecaster.recommend(plan, SIGMAS)
    other = levels(50, shift=1.0)
    found = forecaster.schedule_for(len(plan.full_steps), 50, other)
    assert found != plan
    for ours, trained in zip(found.full_steps, plan.full_steps, strict=True):
        assert abs(other[ours] - SIGMAS[trained]) <= 0.5 / 50 + 1e-6


def test_schedule_for_prefers_the_nearest_sigmas():
    forecaster = LesaForecaster()
    lists = [Schedule.every(7, 50), Schedule.taylorseer(6, 50)]
    for plan, shift in zip(lists, (1.0, 3.0), strict=True):
        forecaster.recommend(plan, levels(50, shift))
    assert forecaster.schedule_for(10, 50) == lists[0]
    assert forecaster.schedule_for(10, 50, levels(50, 2.9)) == lists[1]


def test_schedule_for_fewer_counts_spreads_anew():
    forecaster = LesaForecaster()
    with pytest.raises(LesaError, match="full_steps=10: no schedule to follow"):
        forecaster.schedule_for(10, 50)
    forecaster.recommend(Schedule.explicit((0, 10, 20, 30, 35, 40, 45), 50), SIGMAS)
    assert forecaster.schedule_for(6, 50).full_steps == (0, 6, 15, 25, 35, 44)
    for count in (1, 9, 50):
        assert len(forecaster.schedule_for(count, 50).full_steps) == count
    assert len(forecaster.schedule_for(5, 28).full_steps) == 5
    with pytest.raises(LesaError, match="full_steps=60"):
        forecaster.schedule_for(60, 50)


def test_schedule_for_more_counts_keeps_the_next_smaller_list():
    forecaster = LesaForecaster()
    eight, ten = Schedule.every(10, 50), Schedule.explicit(range(0, 50, 5), 50)
    for plan in (ten, eight):
        forecaster.recommend(plan, SIGMAS)
    for base, counts in ((eight, (9,)), (ten, (11, 12, 15))):
        for count in counts:
            for sigmas in (None, SIGMAS):
                found = forecaster.schedule_for(count, 50, sigmas).full_steps
                assert len(found) == count and set(found) > set(base.full_steps)
    assert forecaster.schedule_for(9, 50, SIGMAS).full_steps[-2:] == (42, 47)  # widest in level
    assert not set(forecaster.schedule_for(16, 50).full_steps) > set(ten.full_steps)
    resampled = forecaster.schedule_for(10, 28, levels(28))
    assert set(forecaster.schedule_for(11, 28, levels(28)).full_steps) > set(resampled.full_steps)


def test_added_steps_leave_each_gap_a_forecast_while_they_can():
    schedule = Schedule.explicit((0, 2, 5, 8), 10)  # gaps of 1, 2, 2 and 1 skipped steps
    found = [grown(schedule, count).full_steps for count in range(5, 11)]
    assert set(found[1]) in ({0, 2, 3, 5, 6, 8}, {0, 2, 3, 5, 7, 8}, {0, 2, 4, 5, 6, 8})
    assert all(set(a) < set(b) for a, b in zip(found, found[1:], strict=False))
    assert [9 in full for full in found] == [False] * 5 + [True]


@pytest.mark.parametrize(("count", "steps"), [(4, 8), (2, 3), (1, 2), (1, 1), (8, 8), (9, 9)])
@pytest.mark.parametrize("told", [True, False])
def test_schedule_for_a_run_of_fewer_steps_than_calibrated_full_ones(count, steps, told):
    forecaster = LesaForecaster()
    forecaster.recommend(PLAN, SIGMAS)  # 10 of 50
    schedule = forecaster.schedule_for(count, steps, levels(steps) if told else None)
    assert (len(schedule.full_steps), schedule.steps) == (count, steps)


@pytest.mark.parametrize("parts", [None, 2])
def test_added_full_steps_change_no_forecast(parts):
    """Given the features of a run, every step that both lists skip is forecast alike."""
    forecaster = shaken()
    rows = random_rows(forecaster)
    split = None if parts is None else torch.stack([rows, 2 * rows], -1)
    forecaster.correct(PLAN, SIGMAS, "cond", rows, split)
    schedule = forecaster.schedule_for(12, 50, SIGMAS)
    base, longer = (forecaster.table(plan, SIGMAS) for plan in (PLAN, schedule))
    truth = torch.randn(50, 4, dtype=torch.float64)
    latent = torch.randn(4, dtype=torch.float64)
    assert base.history == 3 < longer.history <= 8 and longer.parts == base.parts
    for step in schedule.skipped_steps:
        for part in range(base.parts):
            known, more = (
                table.part(part).apply(
                    truth[list(table.schedule.cached_before(step, table.history))], step, latent
                )
                for table in (base, longer)
            )
            torch.testing.assert_close(known, more, rtol=0, atol=1e-12)
    for other in (levels(50, shift=3.1), SIGMAS):  # other levels, or far more steps: by the form
        far = Schedule.explicit(range(0, 50, 2), 50) if other is SIGMAS else schedule
        assert forecaster.table(far, other).history == 3


def paper_loop(forecaster, plan, sigmas, truth, branch):
    """Eqs. 4-7 on features, step by step: the window holds real and predicted features."""
    net, trajectory = forecaster.net, []
    for s in range(plan.num_steps):
        if plan.is_full(s):
            trajectory.append(truth[s])
            continue
        stage = 0 if sigmas[s] > 0.9 else 1 if sigmas[s] > 0.5 else 2
        tau = torch.tensor([[sigmas[s] - t for t in sigmas]], dtype=torch.float64)
        alpha = net.gate(branch, stage, tau)[0]
        z = net.b[branch][stage] * torch.ones_like(truth[0])
        for k in range(1, (4, 8, 8)[stage] + 1):
            z = z + net.w[branch][stage][k - 1] * trajectory[max(s - k, 0)]
        trajectory.append((trajectory[s - 1] + alpha * z).detach())
    return trajectory


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("plan", [PLAN, Schedule.explicit((0, 5, 30), 50)], ids=["every", "rare"])
def test_paper_form_is_its_recursion(gate, plan):
    forecaster = shaken(form="paper", branches=("cond", "uncond"), nodes=16, **GATES[gate])
    table = forecaster.table(plan, SIGMAS, "uncond")
    assert table.autoregressive and table.bias is not None and table.bias.any()
    truth = torch.randn(50, 4, dtype=torch.float64)
    expected = paper_loop(forecaster, plan, SIGMAS, truth, "uncond")
    ring: list[torch.Tensor] = []
    for s in range(50):
        feature = truth[s] if plan.is_full(s) else table.apply(ring, s)
        torch.testing.assert_close(feature, expected[s], rtol=1e-9, atol=1e-9)
        ring = [feature, *ring][: table.history]


@pytest.mark.parametrize("gate", GATES)
def test_untrained_paper_form_is_reuse(gate):
    table = LesaForecaster("paper", **GATES[gate]).table(PLAN, SIGMAS)
    assert (table.coefficients[list(PLAN.skipped_steps), 0] == 1).all()
    assert not table.coefficients[:, 1:].any()


def test_paper_gates_have_the_stated_sizes():
    nets: dict[str, Any] = {}
    for name, fields in GATES.items():
        net: Any = LesaForecaster("paper", **fields).net
        nets[name] = net.gates["cond"]
    assert all(len(gates) == 3 for gates in nets.values())
    assert isinstance(nets["ridge"][0], RidgeSpline) and nets["ridge"][0].projection.shape == (
        256,
        51,
    )
    assert isinstance(nets["edge"][0], KAN)
    assert [layer.spline.shape for layer in nets["edge"][0]] == [
        (256, 51, 8),
        (256, 256, 8),
        (1, 256, 8),
    ]
    assert isinstance(nets["mlp"][0], MLP)
    assert [layer.weight.shape for layer in nets["mlp"][0].layers] == [
        (256, 51),
        (256, 256),
        (1, 256),
    ]


def test_paper_rows_are_differentiable_in_every_parameter_of_the_branch():
    forecaster = shaken(form="paper", nodes=8)
    rows, bias = forecaster.net.rows(PLAN, SIGMAS, "cond")
    (rows.square().sum() + bias.square().sum()).backward()
    untouched = [name for name, p in forecaster.named_parameters() if p.grad is None]
    assert untouched == []
    assert forecaster.net.offsets(SIGMAS).shape == (50, 51)
    assert [forecaster.net.window(stage) for stage in range(3)] == [4, 8, 8]
    assert forecaster.history(PLAN) == 8


def test_paper_form_is_tied_to_its_step_count_and_holds_no_rows():
    forecaster = LesaForecaster("paper", num_steps=28, nodes=8)
    with pytest.raises(LesaError, match="num_steps=50.*tied to 28"):
        forecaster.table(PLAN, SIGMAS)
    plan, sigmas = Schedule.every(4, 28), levels(28)
    rows = forecaster.table(plan, sigmas).coefficients
    with pytest.raises(LesaError, match="form='paper': it holds no calibrated rows"):
        forecaster.correct(plan, sigmas, "cond", rows)
    with pytest.raises(LesaError, match="no coefficients of continuous time"):
        forecaster.coefficients(torch.ones(1), torch.ones(1, 3), torch.ones(1, 3).bool())


@pytest.mark.parametrize("form", ["continuous", "paper", "table"])
def test_protocol(form):
    forecaster = LesaForecaster(form)
    assert isinstance(forecaster, Forecaster)
    assert forecaster.table(PLAN, SIGMAS).history == forecaster.history(PLAN)
    assert forecaster.uses_latent is (form != "paper")
    assert LesaForecaster("table", tap="hidden").uses_latent is False


def test_bf16_does_not_cast_and_the_seed_decides():
    state = torch.get_rng_state()
    first, second = LesaForecaster(), LesaForecaster()
    assert torch.equal(state, torch.get_rng_state())
    nn.ModuleDict({"inner": first}).to(torch.bfloat16)
    first.half()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    other = LesaForecaster(seed=1)
    assert not all(map(torch.equal, first.parameters(), other.parameters()))


def test_cond_and_default_stand_for_each_other_but_uncond_does_not():
    forecaster = shaken(branches=("cond",))
    table = forecaster.table(PLAN, SIGMAS, "default")
    assert torch.equal(table.coefficients, forecaster.table(PLAN, SIGMAS, "cond").coefficients)
    with pytest.raises(LesaError, match="branch='uncond' was not trained, only 'cond'"):
        forecaster.table(PLAN, SIGMAS, "uncond")


def test_check_model_names_both_sides():
    facts = {"model_class": "FluxTransformer2DModel", "model_hash": "aa"}
    forecaster = LesaForecaster(metadata=facts)
    forecaster.check_model("FluxTransformer2DModel", tap="output", branches=("cond",))
    forecaster.check_model("FluxTransformer2DModel", model_hash=None, revision="unrecorded")
    with pytest.raises(LesaError, match="'FluxTransformer2DModel'.*'SD3Transformer2DModel'"):
        forecaster.check_model("SD3Transformer2DModel")
    with pytest.raises(LesaError, match="model_hash='aa'.*'bb'"):
        forecaster.check_model("FluxTransformer2DModel", model_hash="bb")
    with pytest.raises(LesaError, match="tap='output'.*'hidden'"):
        forecaster.check_model("FluxTransformer2DModel", tap="hidden")
    with pytest.raises(LesaError, match="'uncond' was not trained"):
        forecaster.check_model("FluxTransformer2DModel", branches=("uncond",))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"form": "fancy"}, "form='fancy': not one of 'continuous'"),
        ({"tap": "middle"}, "tap='middle': not one of"),
        ({"gate": "cnn"}, "gate='cnn': not one of"),
        ({"spline": "round"}, "spline='round': not one of"),
        ({"history": 0}, "history=0"),
        ({"hidden": (0,)}, r"hidden\[0\]=0"),
        ({"stages": (0.5, 0.9)}, "stages="),
        ({"windows": (4, 8)}, "windows="),
        ({"windows": (4, 0, 8)}, r"windows\[1\]=0"),
        ({"branches": ()}, "branches="),
        ({"history": 10**9}, "history=1000000000: not a whole number of 1 to 64"),
        ({"seed": "x"}, "seed='x': not a whole number"),
        ({"stages": 0.5}, "stages=0.5: not a list"),
        ({"stages": (float("nan"),)}, r"stages\[0\]=nan: not a finite number of 0 to 1"),
        ({"uses_latent": "yes"}, "uses_latent='yes': neither true nor false"),
        ({"branches": ("a.b",)}, "branches="),
        ({"tap": "hidden", "uses_latent": True}, "uses_latent=True"),
        ({"form": "paper", "uses_latent": True}, "uses_latent=True"),
    ],
)
def test_settings_errors_name_the_field_and_value(fields, told):
    with pytest.raises(LesaError, match=told):
        LesaForecaster(**fields)


def test_wrong_sigmas_and_rows_are_refused():
    forecaster = LesaForecaster()
    with pytest.raises(LesaError, match="sigmas=29 values: a schedule of 50"):
        forecaster.table(PLAN, levels(28))
    with pytest.raises(LesaError, match="do not strictly decrease"):
        forecaster.table(PLAN, SIGMAS[::-1])
    with pytest.raises(LesaError, match="do not strictly decrease"):
        forecaster.table(PLAN, [sigma * 14 for sigma in SIGMAS])
    with pytest.raises(LesaError, match="weigh 4 features, and history=3"):
        forecaster.correct(PLAN, SIGMAS, "cond", torch.zeros(50, 5))
    with pytest.raises(LesaError, match="step=0: it is full"):
        forecaster.correct(PLAN, SIGMAS, "cond", torch.ones(50, 4))
    with pytest.raises(LesaError, match="was not trained"):
        forecaster.correct(PLAN, SIGMAS, "uncond", torch.zeros(50, 4))
    assert forecaster.calibrated == []
