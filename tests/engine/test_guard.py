"""Guards: what a run with a picture at risk goes on with, against a run that began with that."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import lesa
from lesa import LesaError, LesaForecaster, Schedule
from lesa.forecasters.guard import Guard
from lesa.hooks.attach import attached

STEPS = 12
PLAN = Schedule.explicit([0, 2, 5, 9], STEPS)
OTHER = Schedule.explicit([0, 2, 7, 10], STEPS)
MORE = Schedule.explicit([0, 2, 3, 5, 7, 9], STEPS)
ALWAYS, NEVER = 0.0, 1e6
TAPS, KINDS = ["output", "hidden"], ["route", "spend"]


def levels(pipe, inputs):
    """The noise levels of the runs of this file."""
    with lesa.accelerate(pipe, schedule=PLAN):
        pipe(**inputs(steps=STEPS))
    scheduler = pipe.scheduler
    return tuple(scheduler.sigmas.double().tolist())


def rows_of(schedule, tap, scale=1.0):
    """Rows that weigh two features, and at the output tap the latent."""
    width = 2 + (tap == "output")
    rows = torch.zeros(schedule.steps, width, dtype=torch.float64)
    for step in schedule.skipped_steps:
        rows[step, 0] = 1.3 * scale
        if len(schedule.cached_before(step, 2)) > 1:
            rows[step, 1] = -0.3 * scale
    return rows


def guarded(pipe, inputs, kind, limit, tap="output", branches=("cond",), sigmas=None):
    made = LesaForecaster(
        "table", history=2, tap=tap, uses_latent=tap == "output", num_steps=STEPS, branches=branches
    )
    sigmas = sigmas or levels(pipe, inputs)
    for branch in branches:
        made.correct(PLAN, sigmas, branch, rows_of(PLAN, tap))
    rows = {b: rows_of(OTHER, tap, 0.9) for b in branches} if kind == "route" else {}
    for other in rows.values():
        other[1] = rows_of(PLAN, tap)[1]  # what ran before the guard looked
    guard = Guard(2, limit, OTHER if kind == "route" else MORE, rows)
    guard.check(PLAN, branches)
    made.calibrations[0].guard = guard
    return made


def run(pipe, inputs, forecaster, schedule=PLAN, seed=7, **options):
    call = {key: options.pop(key) for key in ("batch", "cfg") if key in options}
    with lesa.accelerate(pipe, forecaster, schedule=schedule, **options):
        made = inputs(steps=STEPS, **call) | {"generator": torch.Generator().manual_seed(seed)}
        latents = pipe(**made).images
        return latents, lesa.stats(pipe)


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_at_risk_is_that_of_the_other_list(tiny_flux, inputs, tap, kind):
    forecaster = guarded(tiny_flux, inputs, kind, ALWAYS, tap)
    other = OTHER if kind == "route" else MORE
    latents, found = run(tiny_flux, inputs, forecaster)
    alone, without = run(tiny_flux, inputs, forecaster, schedule=other)
    assert torch.equal(latents, alone)
    assert found.full_steps == other.full_steps and found.full == len(other.full_steps)
    assert found.extra_steps == (() if kind == "route" else (3, 7))
    assert found.guarded == 1 and found.risk > 0 and found.fallbacks == {}
    assert without.guarded == 0 and without.risk is None


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("kind", KINDS)
def test_below_the_limit_nothing_changes(tiny_flux, inputs, tap, kind):
    forecaster = guarded(tiny_flux, inputs, kind, NEVER, tap)
    latents, found = run(tiny_flux, inputs, forecaster)
    plain, off = run(tiny_flux, inputs, forecaster, guard="off")
    assert torch.equal(latents, plain)
    assert found.full_steps == PLAN.full_steps and found.extra_steps == ()
    assert found.guarded == 0 and found.risk == pytest.approx(found.risk) and off.risk is None


def test_the_risk_is_the_largest_relative_change_of_a_picture(tiny_flux, inputs):
    outputs = []
    hook = tiny_flux.transformer.register_forward_hook(lambda m, i, out: outputs.append(out[0]))
    _, found = run(tiny_flux, inputs, guarded(tiny_flux, inputs, "spend", NEVER), batch=3)
    hook.remove()
    first, second = (out.double().flatten(1) for out in outputs[-4:-2])
    change = (second - first).norm(dim=1) / second.norm(dim=1)
    assert found.risk == pytest.approx(float(change.max()), rel=1e-5)
    assert change.max() > change.min()


@pytest.mark.parametrize("kind", KINDS)
def test_one_picture_at_risk_decides_for_its_batch(tiny_flux, inputs, kind):
    _, all_of_them = run(tiny_flux, inputs, guarded(tiny_flux, inputs, kind, NEVER), batch=3)
    forecaster = guarded(tiny_flux, inputs, kind, all_of_them.risk * 0.999)
    assert run(tiny_flux, inputs, forecaster, batch=3)[1].guarded == 1
    forecaster = guarded(tiny_flux, inputs, kind, all_of_them.risk * 1.001)
    assert run(tiny_flux, inputs, forecaster, batch=3)[1].guarded == 0


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("kind", KINDS)
def test_branches_of_guidance_follow_the_first(tiny_flux, inputs, tap, kind):
    branches = ("cond", "uncond")
    _, calm = run(
        tiny_flux, inputs, guarded(tiny_flux, inputs, kind, NEVER, tap, branches), cfg=True
    )
    forecaster = guarded(tiny_flux, inputs, kind, calm.risk * 0.999, tap, branches)
    latents, found = run(tiny_flux, inputs, forecaster, cfg=True)
    other = OTHER if kind == "route" else MORE
    alone, _ = run(tiny_flux, inputs, forecaster, schedule=other, cfg=True)
    assert torch.equal(latents, alone)
    assert found.guarded == 1 and found.full == 2 * len(other.full_steps)


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_behind(tiny_flux, inputs, tap, kind):
    """Also where the last step, which the table would have skipped, is an extra one."""
    forecaster = guarded(tiny_flux, inputs, kind, ALWAYS, tap)
    if kind == "spend":
        last = Schedule.explicit([*PLAN.full_steps, STEPS - 1], STEPS)
        forecaster.calibrations[0].guard = Guard(2, ALWAYS, last)
    left = []
    with lesa.accelerate(tiny_flux, forecaster, schedule=PLAN):
        known = attached(tiny_flux.transformer)

        def look(_pipe, step, _time, tensors):
            if step == STEPS - 1:
                trajectories = known.clock.requests.now().kept.trajectories
                left.extend(trajectory.ring for trajectory in trajectories.values())
            return tensors

        tiny_flux(**inputs(steps=STEPS), callback_on_step_end=look)
        assert lesa.stats(tiny_flux).fallbacks == {}
        assert lesa.stats(tiny_flux).pool["used"] == 0
    assert left == [None]


@pytest.mark.parametrize("kind", KINDS)
def test_within_a_limit_of_memory(tiny_flux, inputs, kind):
    forecaster = guarded(tiny_flux, inputs, kind, ALWAYS)
    latents, found = run(tiny_flux, inputs, forecaster)
    limited, within = run(tiny_flux, inputs, forecaster, memory_limit=found.ring_bytes)
    assert torch.equal(latents, limited)
    assert within.fallbacks == {} and within.pool["refused"] == 0


def test_a_step_count_that_was_not_trained_has_no_guard(tiny_flux, inputs):
    forecaster = guarded(tiny_flux, inputs, "spend", ALWAYS)
    with pytest.warns(UserWarning), lesa.accelerate(tiny_flux, forecaster):
        tiny_flux(**inputs(steps=8))
        assert lesa.stats(tiny_flux).risk is None


def test_a_budget_of_a_request_has_the_guard_of_its_list(tiny_flux, inputs):
    forecaster = guarded(tiny_flux, inputs, "spend", ALWAYS)
    with lesa.accelerate(tiny_flux, forecaster, schedule=MORE), lesa.options(full_steps=4):
        tiny_flux(**inputs(steps=STEPS))
        assert lesa.stats(tiny_flux).extra_steps == (3, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_to_what_one_cached_feature_does_not_hold(tiny_flux, inputs, kind):
    """A list whose rows weigh one feature looks at two, and another one may weigh two."""
    forecaster = guarded(tiny_flux, inputs, kind, ALWAYS)
    rows = forecaster.calibrations[0].rows["cond"]
    rows[:, 0] += rows[:, 1]
    rows[:, 1] = 0
    if kind == "route":
        forecaster.calibrations[0].guard.rows["cond"][1] = rows[1]
    latents, found = run(tiny_flux, inputs, forecaster)
    alone, _ = run(
        tiny_flux, inputs, forecaster, schedule=forecaster.calibrations[0].guard.schedule
    )
    assert found.guarded == 1 and found.fallbacks == {}
    assert torch.equal(latents, alone)


def test_one_picture_of_no_number_hides_no_other(tiny_flux, inputs):
    """What a guard sees of a batch with a broken picture is no number: it acts."""

    forecaster = guarded(tiny_flux, inputs, "spend", NEVER)

    def spoil(_module, _args, output):
        output[0][1] = float("nan")

    hook = tiny_flux.transformer.register_forward_hook(spoil)
    _, found = run(tiny_flux, inputs, forecaster, batch=2)
    hook.remove()
    assert found.risk != found.risk and found.guarded == 1
    assert found.not_finite and found.full == len(MORE.full_steps)


def full_times(pipe, call):
    """The places of the steps that a call computes in full."""
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _module, _args, given: seen.append(float(given["timestep"][0])), with_kwargs=True
    )
    pipe(**call)
    hook.remove()
    times = (pipe.scheduler.timesteps / 1000).tolist()
    return [min(range(len(times)), key=lambda i: abs(times[i] - time)) for time in seen]


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_of_a_disturbed_run_is_that_of_its_guard(tiny_flux, inputs, kind):
    def change(_pipe, step, _time, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] + 1} if step == 3 else {}

    forecaster = guarded(tiny_flux, inputs, kind, ALWAYS)
    disturbed = {
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    with lesa.accelerate(tiny_flux, forecaster, schedule=PLAN):
        steps = full_times(tiny_flux, inputs(steps=STEPS) | disturbed)
        found = lesa.stats(tiny_flux)
    other = OTHER if kind == "route" else MORE
    assert found.guarded == 1 and len(found.fallbacks) == 1
    assert steps == sorted({*other.full_steps, 4})


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_fails_where_the_guard_looks_leaves_nothing_to_the_next(tiny_flux, inputs, kind):
    forecaster = guarded(tiny_flux, inputs, kind, ALWAYS)
    latents, _ = run(tiny_flux, inputs, forecaster)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    with lesa.accelerate(tiny_flux, forecaster, schedule=PLAN):
        hook = tiny_flux.transformer.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            tiny_flux(**inputs(steps=STEPS))
        hook.remove()
        assert lesa.stats(tiny_flux).risk is None
        again = tiny_flux(
            **inputs(steps=STEPS) | {"generator": torch.Generator().manual_seed(7)}
        ).images
        found = lesa.stats(tiny_flux)
    assert torch.equal(again, latents)
    assert found.guarded == 1 and found.fallbacks == {} and found.pool["used"] == 0


class Loop:
    """A denoising loop of one's own around the bare transformer, in a slot."""

    def __init__(self, model, inputs, seed):
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.scheduler.set_timesteps(STEPS)
        self.latent = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(seed))
        self.slot = lesa.Slot(model, scheduler=self.scheduler)
        self.prompt = inputs()["prompt_embeds"] + seed, inputs()["pooled_prompt_embeds"]


def stepping(model, loops):
    """The steps of the loops, in one batch, one by one."""
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3)}
    for time in loops[0].scheduler.timesteps:
        with torch.no_grad(), lesa.Slot.batch([loop.slot for loop in loops]):
            found = model(
                hidden_states=torch.cat([loop.latent for loop in loops]),
                encoder_hidden_states=torch.cat([loop.prompt[0] for loop in loops]),
                pooled_projections=torch.cat([loop.prompt[1] for loop in loops]),
                timestep=time.expand(len(loops)) / 1000,
                **ids,
            ).sample
        for i, loop in enumerate(loops):
            loop.latent = loop.scheduler.step(found[i : i + 1], time, loop.latent).prev_sample
        yield


def together(model, loops):
    """All steps of the loops, in one batch; their latents."""
    for _ in stepping(model, loops):
        pass
    return [loop.latent for loop in loops]


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("kind", KINDS)
def test_of_two_slots_one_is_at_risk(tiny_flux, inputs, tap, kind):
    """Each gets its own list, and is what it is alone."""
    model, scheduler = tiny_flux.transformer, FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    sigmas = tuple(scheduler.sigmas.double().tolist())

    def runs(limit, *groups):
        """Latents of groups of seeds, the risk of the last, and how many were guarded."""
        forecaster = guarded(tiny_flux, inputs, kind, limit, tap, sigmas=sigmas)
        with lesa.accelerate(model, forecaster, schedule=PLAN):
            made = [together(model, [Loop(model, inputs, s) for s in seeds]) for seeds in groups]
            return made, lesa.stats(model)

    risks = [runs(NEVER, [seed])[1].risk for seed in (1, 2)]
    limit = sum(risks) / 2
    ((one,), (two,)), _ = runs(limit, [1], [2])
    (joint,), found = runs(limit, [1, 2])
    other = OTHER if kind == "route" else MORE
    assert found.guarded == 1 and found.fallbacks == {}
    assert found.full == len(PLAN.full_steps) + len(other.full_steps)
    for alone, latent in zip((one, two), joint, strict=True):
        torch.testing.assert_close(latent, alone, rtol=1e-4, atol=1e-4)  # another batch size
    assert not torch.allclose(*runs(ALWAYS, [1], [2])[0][0], *runs(NEVER, [1])[0][0])


def test_what_is_told_of_the_newest_generation_is_not_an_older_ones(tiny_flux, inputs):
    model, scheduler = tiny_flux.transformer, FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    sigmas = tuple(scheduler.sigmas.double().tolist())
    forecaster = guarded(tiny_flux, inputs, "spend", ALWAYS, sigmas=sigmas)
    with lesa.accelerate(model, forecaster, schedule=PLAN):
        older, newest = (stepping(model, [Loop(model, inputs, seed)]) for seed in (1, 2))
        for loop in (older, older, newest, older):  # whose step 2 is the guard's
            next(loop)
        found = lesa.stats(model)
    assert found.generations == 2 and found.guarded == 1
    assert found.risk is None and found.extra_steps == () and found.full_steps == PLAN.full_steps


def test_what_a_forecaster_has_no_guard_for(tiny_flux, inputs):
    forecaster = guarded(tiny_flux, inputs, "spend", ALWAYS)
    with pytest.raises(LesaError, match=r"guard='route': .* lesa-table has guard='spend'; leave"):
        lesa.enable(tiny_flux, forecaster, guard="route")
    with pytest.raises(LesaError, match=r"guard='spend': the forecaster .* has none; leave guard"):
        lesa.enable(tiny_flux, guard="spend")
    for wrong in ("on", 1, True, ["off"]):
        with pytest.raises(LesaError, match=r"guard=.*: unknown; give one of 'off', 'route'"):
            lesa.enable(tiny_flux, forecaster, guard=wrong)
    assert attached(tiny_flux.transformer) is None
    lesa.enable(tiny_flux, forecaster, guard="off")
    lesa.disable(tiny_flux)
