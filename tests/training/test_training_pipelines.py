"""Training on every kind of pipeline: two guidance calls, batched guidance, video, few steps."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from training_jobs import BATCHED, GUIDANCE, STEPS, TWO_CALLS, decibels, make, make_job, reuse

import lesa
from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.hooks.outputs import read_sample
from lesa.hooks.prompt_inputs import count_prompts, prompt_arguments
from lesa.training.closed_loop import run_rollouts
from lesa.training.collect import collect
from lesa.training.job import Job, parts_of
from lesa.training.rollout import Rollout, RolloutSpec, Visit
from lesa.training.statistics import Statistics


def test_joint_gram_holds_the_products_of_a_picture_own_rows():
    """Batched guidance, two pictures per prompt: against features recorded from outside."""
    job = make_job("sdxl", num_images_per_prompt=2)
    seen = []
    hook = job.models[0].register_forward_hook(
        lambda _, args, __, output: seen.append((args[0].clone(), read_sample(output).clone())),
        with_kwargs=True,
    )
    final = job.run(range(2), STEPS)
    hook.remove()
    latents, outputs = zip(*seen, strict=True)
    found = collect(job, STEPS)
    assert found.rows == {"default": 2} and found.joint.shape == (4, 3 * STEPS + 2, 3 * STEPS + 2)
    for picture in range(4):
        rows = [step[half * 4 + picture] for half in range(2) for step in outputs]
        rows += [*(step[picture] for step in latents), final[picture]]
        basis = torch.stack([*rows, torch.ones_like(rows[0])]).double().flatten(1)
        exact = basis @ basis.T / basis.shape[1]
        torch.testing.assert_close(found.joint[picture], exact, rtol=1e-5, atol=1e-6)


def test_sampler_of_a_scaled_input_and_batched_guidance_is_the_schedulers():
    """Euler on predicted noise: x' = x + eps dsigma, and the denoiser gets x / sqrt(s^2 + 1)."""
    job = make_job("sdxl")
    found = collect(job, STEPS)
    sigmas = job.pipe.scheduler.sigmas.double()
    shown = 1 / (sigmas.square() + 1).sqrt()
    shown[-1] = 1  # the final latent is not scaled
    torch.testing.assert_close(found.sampler.keep, shown[1:] / shown[:-1], rtol=1e-4, atol=0)
    weights = torch.tensor([1 - GUIDANCE, GUIDANCE], dtype=torch.float64)
    rates = (shown[1:] * sigmas.diff())[:, None] * weights
    torch.testing.assert_close(found.sampler.rates, rates, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.weights("default"), weights, rtol=1e-4, atol=0)
    assert found.sampler.misfit < 1e-4
    # Moving the last outputs by a unit moves the final latent by the last step of sigma.
    assert found.influence()["default"][-1] == pytest.approx(float(sigmas[-1] - sigmas[-2]), 1e-3)


def test_sampler_of_two_calls_has_the_guidance_weights():
    found = collect(make_job("hunyuan-video"), STEPS)
    steps = torch.tensor(found.sigmas, dtype=torch.float64).diff()
    exact = steps[:, None] * torch.tensor([GUIDANCE, 1 - GUIDANCE], dtype=torch.float64)
    torch.testing.assert_close(found.sampler.rates, exact, rtol=1e-3, atol=1e-5)
    assert found.rows == {"cond": 1, "uncond": 1} and found.sampler.misfit < 1e-4


def test_a_sampler_that_adds_noise_is_not_trusted():
    from diffusers import EulerAncestralDiscreteScheduler

    job = make_job("sdxl")
    job.pipe.scheduler = EulerAncestralDiscreteScheduler()
    assert not collect(job, STEPS).sampler.trusted


def test_statistics_of_two_rows_survive_a_file(tmp_path):
    found = collect(make_job("sd3"), STEPS)
    found.save(tmp_path / "s.safetensors")
    again = Statistics.load(tmp_path / "s.safetensors")
    assert (again.rows, again.num_latents) == ({"default": 2}, STEPS + 1)
    torch.testing.assert_close(again.mean("default"), found.mean("default"), rtol=0, atol=0)


def test_rows_with_guidance_are_fitted_to_their_guided_sum():
    """argmin_c |sum_h g_h (sum_k c_k r_kh - v_h)|^2, in closed form."""
    shares = torch.tensor([-3.0, 4.0], dtype=torch.float64)
    ring, base = torch.randn(2, 2, 3, 40), torch.randn(2, 3, 40)
    rollout = Rollout(RolloutSpec(Schedule.explicit((0, 1), 3), 2, uses_latent=False, ridge=0.0))
    rollout.result.coefficients["default"] = torch.zeros(3, 2, dtype=torch.float64)
    for feature in ring:
        rollout.push("default", feature)
    forecast = rollout.forecast(Visit(2, "default", shares), base, (base, base))
    seen = torch.einsum("h,khpd->kpd", shares, ring.flip(0).double()).flatten(1)
    target = torch.einsum("h,hpd->pd", shares, base.double()).flatten()
    exact = torch.linalg.lstsq(seen.T, target[:, None]).solution[:, 0]
    torch.testing.assert_close(
        rollout.result.coefficients["default"][2], exact, rtol=1e-4, atol=1e-6
    )
    mixed = torch.einsum("k,khpd->hpd", exact, ring.flip(0).double())
    torch.testing.assert_close(forecast.double(), mixed, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("full", "line"), [((0,), [1.0]), ((0, 2), [1.5, -0.5]), ((1, 2), [2, -1])]
)
def test_early_rows_are_drawn_to_a_line_and_later_ones_are_not(full, line):
    """The line through the features of steps 0 and 2 at step 3, and of 1 and 2 at step 4, where it
    goes no farther than their distance; 0.4 of it and 0.6 of the least squares."""
    step, size = (4 if full == (1, 2) else 3), len(full)
    torch.manual_seed(0)
    ring, base = torch.randn(size, 1, 3, 40), torch.randn(1, 3, 40)
    schedule = Schedule.explicit(sorted({0, *full}), 5)
    found = {}
    for sigma in (0.9, 0.85):
        rollout = Rollout(RolloutSpec(schedule, size, uses_latent=False, ridge=0.0, shrinkage=0.4))
        rollout.result.coefficients["cond"] = torch.zeros(5, size, dtype=torch.float64)
        for feature in ring:
            rollout.push("cond", feature)
        rollout.forecast(Visit(step, "cond", sigma=sigma), base, (base, base))
        found[sigma] = rollout.result.coefficients["cond"][step]
    matrix = ring.flip(0).double().flatten(1).T
    exact = torch.linalg.lstsq(matrix, base.double().flatten()[:, None]).solution[:, 0]
    torch.testing.assert_close(found[0.85], exact, rtol=1e-6, atol=1e-8)
    drawn = 0.6 * exact + 0.4 * torch.tensor(line, dtype=torch.float64)
    torch.testing.assert_close(found[0.9], drawn, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", range(8))
def test_behind_a_norm_the_fit_is_no_worse_than_where_it_began(seed):
    """A norm hides the scale of a feature: an undamped Gauss-Newton step ended anywhere, 40 dB
    below the row that it began with."""
    torch.manual_seed(seed)
    still, slope, bend = (torch.randn(1, 2, 40) for _ in range(3))
    path = [still + 0.05 * t * slope + 0.01 * t * t * bend for t in range(4)]

    def tail(feature):
        return torch.nn.functional.layer_norm(feature, (40,))

    truth = tail(path[3]) + 0.05 * torch.randn(1, 2, 40)
    prior = torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64)
    rollout = Rollout(RolloutSpec(Schedule.explicit((0, 1, 2), 4), 3, uses_latent=False))
    for feature in path[:3]:
        rollout.push("cond", feature)
    rollout.result.coefficients["cond"] = torch.stack([torch.zeros_like(prior)] * 3 + [prior])
    output = rollout.forecast(Visit(3, "cond"), truth, (truth, truth), lambda _: tail)
    began = tail(2 * path[2] - path[1])
    assert (output - truth).norm() <= (began - truth).norm()


def test_behind_a_tail_the_fit_sees_what_the_tail_lets_through():
    """Gauss-Newton through a tail that drops half of the feature: the best row by float64 search
    over the outputs, not the best row of the features."""
    torch.manual_seed(0)
    ring = [torch.randn(1, 2, 40) for _ in range(2)]

    def tail(feature):
        kept = feature[..., :20]
        return kept / (1 + 0.1 * kept.square())

    truth = tail(0.7 * ring[0] + 0.6 * ring[1]) + 0.01 * torch.randn(1, 2, 20)
    rollout = Rollout(RolloutSpec(Schedule.explicit((0, 1), 3), 2, uses_latent=False, ridge=0.0))
    for feature in ring[::-1]:
        rollout.push("cond", feature)
    rollout.result.coefficients["cond"] = torch.tensor(
        [[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
    ).double()
    output = rollout.forecast(Visit(2, "cond"), truth, (truth, truth), lambda _: tail)
    row = rollout.result.coefficients["cond"][2]

    def loss(weights):
        return (tail(weights[0] * ring[0] + weights[1] * ring[1]) - truth).square().mean()

    best = row.clone().requires_grad_()
    solver = torch.optim.LBFGS([best], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        value = loss(best)
        value.backward()
        return value

    solver.step(closure)
    assert torch.allclose(row, best.detach(), atol=0.02)
    assert loss(row) < 1.5 * loss(best.detach()) < 0.01 * loss(torch.tensor([1.0, 0.0]))
    mixed = (row[0] * ring[0] + row[1] * ring[1]).float()
    assert torch.allclose(output, tail(mixed), atol=1e-5)


def test_hidden_features_learn_the_sampler_from_one_more_run():
    job = replace(make_job("sdxl"), tap="hidden")
    told, own = (collect(each, STEPS).sampler for each in (job, replace(job, tap="output")))
    assert told.misfit < 1e-3
    assert torch.allclose(told.rates, own.rates, atol=1e-3)


def test_the_second_call_makes_up_for_what_the_first_one_missed():
    """argmin_c |w e_cond + (1 - w) e_uncond|^2 over the second branch's coefficients."""
    w, one = 4.0, torch.ones(1, dtype=torch.float64)
    ring, truth = torch.randn(2, 1, 3, 40), torch.randn(2, 1, 3, 40)
    rollout = Rollout(
        RolloutSpec(Schedule.explicit((0,), 2), 1, uses_latent=False, ridge=0.0, drift=0.0)
    )
    errors = []
    for branch, rate, feature, base in zip("cu", (w, 1 - w), ring, truth, strict=True):
        rollout.result.coefficients[branch] = torch.zeros(2, 1, dtype=torch.float64)
        rollout.push(branch, feature)
        forecast = rollout.forecast(Visit(1, branch, one, rate), base, (base, base))
        errors.append(rate * (forecast - base).double().flatten())
    guided = sum(errors)
    assert abs(guided @ ring[1].double().flatten()) < 1e-3 * guided.norm() * ring[1].norm()


@pytest.mark.parametrize("name", [*TWO_CALLS[:2], "sdxl"])
def test_rollouts_are_what_the_engine_does(name):
    """The engine ends where a frozen rollout ended; a rollout of full steps is the base run."""
    more = {"num_images_per_prompt": 2} if name == "sdxl" else {}
    job, schedule = make_job(name, **more), Schedule.explicit((0, 2, 4), STEPS)
    rollouts = [
        Rollout(RolloutSpec(schedule, 3, frozen=True)),
        Rollout(RolloutSpec(Schedule.every(1, STEPS), 3)),
    ]
    run_rollouts(job, rollouts, reuse(4), STEPS, collect(job, STEPS))
    assert rollouts[1].result.score.min() > 80  # float32 noise of another batch size
    plain = job.run(range(2), STEPS)
    with lesa.accelerate(job.pipe, lesa.Reuse(), schedule=schedule):
        fast = job.run(range(2), STEPS)
    torch.testing.assert_close(decibels(plain, fast), rollouts[0].result.score, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", ["qwen", "hunyuan-video", "sdxl", "chroma", "sana", "wan-2.2"])
def test_training_beats_reuse_and_taylor_on_its_own_prompts(name, tmp_path):
    pipe, call = make(name)
    job = Job(pipe, ["a", "b"], call)
    options = dict(form="table", budget=20, progress=False)
    trained = lesa.train(pipe, None, STEPS, 3, call=call, **options)
    assert GUIDANCE in trained.metadata["call"].values()
    trained.save_pretrained(tmp_path)
    again = lesa.LesaForecaster.from_pretrained(tmp_path)
    plain, schedule = job.run(range(2), STEPS), trained.schedule_for(3, STEPS)
    calls = len(trained.branches)
    assert (trained.table(schedule, trained.calibrations[0].sigmas).parts == 2) == (
        name in (*BATCHED, "sana")
    )

    def quality(forecaster):
        with lesa.accelerate(pipe, forecaster, schedule=schedule):
            fast = job.run(range(2), STEPS)
            counted = lesa.stats(pipe)
        assert (counted.full, counted.skipped) == (3 * calls, (STEPS - 3) * calls)
        assert not counted.fallbacks
        return decibels(plain, fast).mean()

    assert quality(again) == quality(trained)
    # a multistep sampler, whose memory least squares per step do not see, may cost a little
    allowed = 0.5 if name == "wan-2.2" else 0.0
    assert quality(trained) > max(quality(lesa.Reuse()), quality(lesa.Taylor(1))) - allowed


@pytest.mark.parametrize("latent", [False, True])
def test_parts_are_fitted_together_to_their_guided_sum(latent, monkeypatch):
    """argmin_c |sum_h g_h (sum_k c_kh r_kh - v_h) + c_x x|^2, not tied to one row for all."""
    monkeypatch.setattr("lesa.training.row_fit.TIE", 1e-12)
    shares = torch.tensor([-3.0, 4.0], dtype=torch.float64)
    ring, base, x = torch.randn(2, 2, 3, 40), torch.randn(2, 3, 40), torch.randn(1, 3, 40)
    rollout = Rollout(RolloutSpec(Schedule.explicit((0, 1), 3), 2, latent, ridge=0.0))
    rollout.start("default", torch.zeros(3, 2 + latent, dtype=torch.float64), 2)
    for feature in ring:
        rollout.push("default", feature)
    forecast = rollout.forecast(Visit(2, "default", shares), x.repeat(2, 1, 1), (x, base))
    seen = torch.einsum("h,khpd->hkpd", shares, ring.flip(0).double()).flatten(0, 1).flatten(1)
    seen = torch.cat([seen, x.double().flatten(1)]) if latent else seen
    target = torch.einsum("h,hpd->pd", shares, base.double()).flatten()
    exact = torch.linalg.lstsq(seen.T, target[:, None]).solution[:, 0]
    guided = torch.einsum("h,hpd->pd", shares, forecast.double()).flatten()
    best, one = seen.T @ exact, rollout.result.shared["default"][2]
    assert (guided - target).norm() < (1 + 1e-3) * (best - target).norm()
    found = rollout.result.coefficients["default"][2]
    assert one.shape == (2 + latent,) and found.shape == (2 + latent, 2)
    torch.testing.assert_close(found[:2].T.flatten(), exact[:4], rtol=1e-3, atol=1e-4)
    assert not latent or found[2, 0] == found[2, 1]


def test_a_run_without_guidance_takes_the_row_for_all_parts():
    """Bit for bit what a forecaster does that has no rows for parts."""
    pipe, call = make("sdxl")
    trained = lesa.train(pipe, None, STEPS, 3, call=call, form="table", refine=0, progress=False)
    job = Job(pipe, ["a", "b"], {**call, "guidance_scale": 1.0})

    def runs():
        with lesa.accelerate(pipe, trained, full_steps=3):
            return [each.run(range(2), STEPS) for each in (job, Job(pipe, ["a", "b"], call))]

    with_parts = runs()
    trained.calibrations[0].split.clear()
    without = runs()
    assert torch.equal(with_parts[0], without[0]) and not torch.equal(with_parts[1], without[1])


def test_rescaled_guidance_leaves_one_row_for_all_parts():
    """Its sampler sees more than the guided sum: what cancels there would come back."""
    pipe, call = make("sdxl", guidance_rescale=0.7)
    trained = lesa.train(pipe, None, STEPS, 3, call=call, form="table", refine=0, progress=False)
    assert not trained.calibrations[0].split and trained.calibrations[0].rows


@pytest.mark.parametrize(("steps", "count"), [(4, 2), (4, 1), (8, 5), (8, 4), (8, 2)])
def test_few_steps_beat_reuse_with_what_the_ring_holds(steps, count):
    pipe, call = make("flux", guidance_scale=0.0)
    call["true_cfg_scale"] = 1.0
    job = Job(pipe, ["a", "b"], call)
    trained = lesa.train(pipe, None, steps, count, call=call, form="table", progress=False)
    schedule = trained.schedule_for(count, steps)
    table = trained.table(schedule, trained.calibrations[0].sigmas)
    assert table.used(schedule.skipped_steps[0]).endswith("of 3 features + latent") or count > 2
    rollouts = [
        Rollout(RolloutSpec(schedule, 3, drift=0.0)),
        Rollout(RolloutSpec(schedule, 3, frozen=True)),
    ]
    run_rollouts(job, rollouts, reuse(4), steps)
    assert rollouts[0].result.score.mean() > rollouts[1].result.score.mean() + 1
    plain = job.run(range(2), steps)
    runs = []
    for forecaster in (trained, lesa.Reuse()):
        with lesa.accelerate(pipe, forecaster, schedule=schedule):
            runs.append(decibels(plain, job.run(range(2), steps)).mean())
    assert runs[0] > runs[1] + 2.5  # 2.8 and more were measured


def test_a_table_says_what_each_step_is_made_from():
    """4 steps, full at 0 and 2, K = 3: one cached feature at step 1, two at step 3."""
    schedule = Schedule.explicit((0, 2), 4)
    table = lesa.LesaForecaster(form="table").table(schedule, (1.0, 0.7, 0.5, 0.3, 0.0))
    told = [table.used(step) for step in range(4)]
    some = "1 of 3 features + latent", "2 of 3 features + latent"
    assert told == ["model", some[0], "model", some[1]]
    assert lesa.Reuse().table(schedule).used(1) == "1 feature"


@pytest.mark.parametrize("name", ["sd3", "pixart", "wan", "kontext"])
def test_other_pipelines_train_and_run(name):
    pipe, call = make(name)
    call.pop("true_cfg_scale", None)
    forecaster = lesa.train(pipe, None, STEPS, 3, call=call, form="table", progress=False)
    with lesa.accelerate(pipe, forecaster, full_steps=3):
        Job(pipe, ["a", "b"], call).run(range(2), STEPS)
        counted = lesa.stats(pipe)
    assert counted.skipped == 3 * len(forecaster.branches) and not counted.fallbacks


def test_two_transformers_have_no_hidden_tap_in_common():
    pipe, call = make("wan-2.2")
    with pytest.raises(LesaError, match="WanPipeline has 2 transformers.*tap='output'"):
        lesa.train(pipe, None, STEPS, 3, tap="hidden", call=call, progress=False)


@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_a_list_with_a_tensor_for_every_picture_is_a_batch(tap):
    """Z-Image: its latents, prompts and outputs are lists."""
    pipe, call = make("z-image")
    job = Job(pipe, ["a", "b"], call)
    plain = job.run(range(2), STEPS)
    trained = lesa.train(pipe, None, STEPS, 3, tap=tap, call=call, form="table", progress=False)
    found = {}
    for forecaster in (trained, lesa.Reuse()):
        schedule = trained.calibrated[0]
        with lesa.accelerate(pipe, forecaster, schedule=schedule, tap=tap):
            found[forecaster.name] = decibels(plain, job.run(range(2), STEPS)).mean()
            counted = lesa.stats(pipe)
        assert (counted.full, counted.skipped, counted.fallbacks) == (3, 3, {})
    assert found["lesa-table"] > found["fora"]


def test_a_model_without_one_output_tensor_is_told(monkeypatch):
    pipe, call = make("flux")
    forward = pipe.transformer.forward
    monkeypatch.setattr(
        pipe.transformer, "forward", lambda *args, **kwargs: 2 * forward(*args, **kwargs)
    )
    with pytest.raises(LesaError, match="returns no single tensor .* lesa.enable"):
        lesa.train(pipe, None, STEPS, 3, call=call, progress=False)
    call.pop("true_cfg_scale")
    lesa.enable(pipe, lesa.Reuse(), schedule=Schedule.fora(2))  # the remedy
    Job(pipe, ["a", "b"], call).run(range(2), STEPS)
    assert lesa.stats(pipe).skipped == 3


def test_arguments_of_some_prompts():
    embeddings, shared = torch.arange(3.0)[:, None], torch.zeros(5)
    given = {"prompt_embeds": embeddings, "negative_prompt_embeds": embeddings, "shift": shared}
    taken = prompt_arguments("abc", given, [2, 0, 2])
    assert "prompt" not in taken and taken["shift"] is shared
    assert taken["prompt_embeds"].flatten().tolist() == [2, 0, 2]
    texts = prompt_arguments("abc", {"negative_prompt": " ", "num_images_per_prompt": 2}, [1, 1])
    assert texts["prompt"] == ["b", "b"] and texts["negative_prompt"] == [" ", " "]
    assert count_prompts(given) == 3
    with pytest.raises(LesaError, match="prompts=None: .* prompt_embeds"):
        count_prompts({})


def test_rows_that_do_not_divide_are_told():
    assert parts_of(8, 4) == 2
    with pytest.raises(LesaError, match="7 rows for 4 pictures"):
        parts_of(7, 4)


@pytest.mark.parametrize(
    ("name", "guided", "scale"),
    [
        ("pixart", True, "guidance_scale"),  # its parts are not told, but counted
        ("sdxl", True, "guidance_scale"),
        ("qwen", True, "true_cfg_scale"),
        ("flux", False, "guidance_scale"),  # told to the denoiser
    ],
)
def test_guidance_above_that_of_the_training_is_noticed(name, guided, scale):
    pipe, call = make(name)
    call.pop("true_cfg_scale", None) if name == "flux" else None
    assert (
        is_noticed(pipe, call, {scale: 9.0}, f"^{scale}=9: the forecaster was trained at") is guided
    )


def is_noticed(pipe, call, more, told):
    """Trains with a call, and runs it without a warning; with more guidance it comes. Whether the
    training had guidance as outputs of their own."""
    plan = lesa.Schedule.explicit((0, 2), STEPS)
    options = dict(form="table", schedule=plan, validation=0, polish=0, refine=0, progress=False)
    trained = lesa.train(pipe, None, STEPS, 2, call=call, **options)
    call |= {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
    with lesa.accelerate(pipe, trained):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            pipe(**call)
        with pytest.warns(UserWarning, match=told):
            pipe(**call | more)
    return trained.metadata["guided"]


@pytest.mark.parametrize("name", ["sdxl", "pixart"])
def test_guidance_that_the_training_had_not_is_noticed(name):
    pipe, call = make(name)
    call |= {"guidance_scale": 1.0}
    more = {"guidance_scale": torch.tensor(5.0) if name == "sdxl" else 5.0}
    told = "^guidance_scale=5: the forecaster was trained at 1;"
    assert is_noticed(pipe, call, more, told) is False


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_training_under_autocast(name):
    """The latent is float32 at the first step and bfloat16 from the second on."""
    pipe, call = make(name)
    options = dict(form="table", validation=0, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        trained = lesa.train(pipe, None, STEPS, 2, call=call, **options)
    (entry,) = trained.calibrations
    assert all(rows.isfinite().all() for rows in entry.rows.values())
