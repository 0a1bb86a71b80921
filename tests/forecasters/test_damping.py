import warnings
from math import exp

import pytest
import torch
from safetensors.torch import load_file

import lesa
from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.forecasters import LesaForecaster
from lesa.forecasters.calibration import Calibration
from lesa.forecasters.damping import OVER, WIDTH, carried, damped, prior_line, reuse
from lesa.forecasters.mismatch import excess, mismatch
from lesa.forecasters.moments import Moments, interpolation
from lesa.forecasters.prior import Prior
from lesa.testbed import load, prompts, settings

PLAN = Schedule.explicit([0, 3, 8, 14], 20)


def levels(steps, shift=3.0):
    times = [1 - s / steps for s in range(steps + 1)]
    return tuple(shift * t / (1 + (shift - 1) * t) for t in times)


SIGMAS = levels(20)


def gram_of(features):
    """Mean inner products of features [S, D]."""
    return features @ features.T / features.shape[1]


def line(sigmas=SIGMAS):
    """Features that are straight lines in the noise level."""
    draw = torch.Generator().manual_seed(0)
    start, slope = torch.randn(2, 64, generator=draw, dtype=torch.float64)
    return start + torch.tensor(sigmas[:-1], dtype=torch.float64)[:, None] * slope


def line_at(steps):
    """Features on a line and latents that stray, for `steps` steps."""
    return torch.cat([line(levels(steps)), walk(steps, 64)])


def walk(steps, elements=4000):
    """Features that move by chance: nothing but the newest one tells of the next."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(steps, elements, generator=draw, dtype=torch.float64).cumsum(0)


def test_interpolation_is_exact_on_lines_and_stays_at_the_ends():
    nodes = [0.9, 0.6, 0.5, 0.1]
    weights = interpolation(nodes, [1.0, 0.9, 0.7, 0.5, 0.2, 0.1, 0.0])
    values = weights @ torch.tensor([3 * x + 1 for x in nodes], dtype=torch.float64)
    expected = [3 * x + 1 for x in (0.9, 0.9, 0.7, 0.5, 0.2, 0.1, 0.1)]
    assert values.tolist() == pytest.approx(expected, abs=1e-12)
    assert interpolation([0.3], [0.9, 0.1]).tolist() == [[1.0], [1.0]]


def test_moments_at_their_own_and_at_other_levels():
    features, latents = line(), 2 * line() + 1
    moments = Moments()
    moments.keep(SIGMAS, {"cond": gram_of(torch.cat([features, latents]))}, latent=True)
    own = moments.at("cond", SIGMAS[:-1], latent=True)
    torch.testing.assert_close(own, gram_of(torch.cat([features, latents])), rtol=1e-5, atol=1e-5)
    other = levels(9, shift=2.0)[:-1]
    inside = [max(level, SIGMAS[-2]) for level in other]
    expected = gram_of(line([*inside, 0.0]))
    torch.testing.assert_close(moments.at("cond", other, False), expected, rtol=1e-4, atol=1e-5)
    assert moments.at("uncond", other, latent=False) is None
    moments.keep(SIGMAS, {"cond": gram_of(features)}, latent=False)
    assert moments.at("cond", other, latent=True) is None


def test_damped_follows_a_line_where_plain_runs_are_lines():
    rows = damped(PLAN, gram_of(line()), 2, latent=False)
    ahead = [s for s in PLAN.skipped_steps if s > 3]
    forecast = torch.stack([rows[s] @ line()[list(PLAN.cached_before(s, 2))] for s in ahead])
    torch.testing.assert_close(forecast, line()[ahead], rtol=0, atol=0.1)
    reused = (line()[[PLAN.cached_before(s, 1)[0] for s in ahead]] - line()[ahead]).square().mean()
    assert (forecast - line()[ahead]).square().mean() < 0.02 * reused
    assert not rows[list(PLAN.full_steps)].any()


def test_damped_is_reuse_where_nothing_can_be_forecast():
    rows = damped(PLAN, gram_of(walk(20)), 3, latent=False)
    torch.testing.assert_close(rows, reuse(PLAN, 3), rtol=0, atol=0.05)


def test_wide_gaps_are_damped_more_than_narrow_ones():
    """Features that are smooth over a tenth of the run: lines within it, chance beyond."""
    steps, width = 100, 10
    kernel = torch.exp(-0.5 * ((torch.arange(41) - 20.0) / width).square()).double()
    noise = torch.randn(400, steps + 40, generator=torch.Generator().manual_seed(2)).double()
    features = torch.conv1d(noise[:, None], kernel[None, None])[:, 0].T + 3
    strayed = []
    for interval in (4, 8, 16):
        plan = Schedule.fora(interval, steps)
        rows = damped(plan, gram_of(features), 3, latent=False)
        last = [s for s in plan.skipped_steps if s > 50 and s % interval == interval - 1]
        strayed.append(float((rows[last] - reuse(plan, 3)[last]).abs().sum(1).mean()) / interval)
    assert strayed[0] > 1.5 * strayed[1] > 3 * strayed[2]


def test_a_run_of_longer_steps_is_damped_more():
    gram, pulls = gram_of(line()), []
    for longer in (0.5, 1.0, 4.0, 10.0):
        places = [longer * step for step in range(21)]
        rows = damped(PLAN, gram, 2, False, places) - reuse(PLAN, 2)
        pulls.append(float(rows[19].abs().sum()))
    plain = damped(PLAN, gram, 2, False) - reuse(PLAN, 2)
    assert pulls[0] == pulls[1] == pytest.approx(float(plain[19].abs().sum()), abs=1e-12)
    assert pulls[2] == pytest.approx(pulls[1] * exp(-4), rel=1e-2) and pulls[3] < 1e-3


def test_the_priors_line_takes_over_where_gaps_are_narrow():
    plan, at = (
        Schedule.explicit([0, 2, 4, 6, 34, 36], 40),
        levels(40, 5.0),
    )  # even steps of the prior
    found = prior_line(plan, at, 4)
    prior = Prior().table(plan, at).coefficients
    torch.testing.assert_close(found.rows[:, :2], prior, rtol=0, atol=0)
    assert not found.rows[:, 2:].any() and not found.shares[list(plan.full_steps)].any()
    assert found.shares[1] == 0  # one feature is no line
    assert found.shares[5] > 0.99 and found.shares[[20, 35]].max() < 0.01  # 35: after a wide gap
    assert found.shares[20] == pytest.approx(1 / (1 + (0.7 / WIDTH) ** 8))
    gram = gram_of(line_at(40))
    plain, lined = damped(plan, gram, 3, True), damped(plan, gram, 3, True, line=found)
    expected = plain + found.shares[:, None] * (found.rows - plain)
    torch.testing.assert_close(lined, expected, rtol=0, atol=1e-12)
    assert float((lined - plain)[5].abs().max()) > 1e-2
    longer = damped(plan, gram, 3, True, [10.0 * step for step in range(41)], found)
    torch.testing.assert_close(longer, reuse(plan, 4), rtol=0, atol=1e-3)


@pytest.mark.parametrize("parts", [0, 2])
def test_rows_are_carried_exactly_to_their_own_gaps_and_not_far(parts):
    draw = torch.Generator().manual_seed(0)
    rows = torch.rand(20, 4, generator=draw, dtype=torch.float64) * (reuse(PLAN, 1) != 0)
    split = {"cond": torch.stack([rows + 1, rows - 1], -1)} if parts else {}
    known = [Calibration(PLAN, SIGMAS, {"cond": rows}, split)]
    found = carried(reuse(PLAN, 4), known, PLAN, SIGMAS, "cond", 3)
    skipped = list(PLAN.skipped_steps)
    torch.testing.assert_close(found.shared[skipped], rows[skipped], rtol=0, atol=1e-12)
    assert (found.split is not None) == bool(parts)
    if found.split is not None:
        expected = split["cond"][skipped]
        torch.testing.assert_close(found.split[skipped], expected, rtol=0, atol=1e-12)
    far = Schedule.explicit([0, 10], 20)
    base = reuse(far, 4)
    assert torch.equal(carried(base, known, far, SIGMAS, "cond", 3).shared, base)
    assert torch.equal(carried(base, known, far, SIGMAS, "uncond", 3).shared, base)


def test_the_nearer_a_gap_the_more_of_its_rows():
    rows = 5 * reuse(PLAN, 4)
    known = [Calibration(PLAN, SIGMAS, {"cond": rows})]
    base, shares = reuse(PLAN, 4), []
    for shift in (3.0, 3.1, 3.5, 5.0):
        found = carried(base, known, PLAN, levels(20, shift), "cond", 3).shared
        shares.append(float((found - base)[9, 0]) / 4)
    assert shares[0] == pytest.approx(1) and shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.5


def trained():
    forecaster = LesaForecaster(metadata={"scheduler": "FlowMatchEulerDiscreteScheduler"})
    forecaster.correct(PLAN, SIGMAS, "cond", 2 * reuse(PLAN, 4))
    gram = gram_of(torch.cat([line(), walk(20, 64)]))
    forecaster.moments.keep(SIGMAS, {"cond": gram}, latent=True)
    return forecaster


def test_a_forecaster_off_its_calibration():
    forecaster, plan = trained(), Schedule.fora(4, 12)
    assert torch.equal(forecaster.table(PLAN, SIGMAS).coefficients, 2 * reuse(PLAN, 4))
    gram = forecaster.moments.at("cond", levels(12)[:-1], latent=True)
    places, line = forecaster.moments.places(levels(12)), prior_line(plan, levels(12), 4)
    base = damped(plan, gram, 3, True, places, line)
    expected = carried(base, forecaster.calibrations, plan, levels(12), "cond", 3).shared
    found = forecaster.table(plan, levels(12)).coefficients
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    base = damped(plan, gram, 3, True, places)
    expected = carried(base, forecaster.calibrations, plan, levels(12), "cond", 3).shared
    found = forecaster.table(plan, levels(12), multistep=True).coefficients
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert torch.equal(forecaster.table(PLAN, SIGMAS, noise=True).coefficients, reuse(PLAN, 4))
    forecaster.moments = Moments()  # as saved by an earlier lesa
    expected = carried(reuse(plan, 4), forecaster.calibrations, plan, levels(12), "cond", 3).shared
    assert torch.equal(forecaster.table(plan, levels(12)).coefficients, expected)


def test_moments_are_saved_with_the_forecaster(tmp_path):
    forecaster, plan = trained(), Schedule.fora(4, 12)
    forecaster.save_pretrained(tmp_path)
    back = LesaForecaster.from_pretrained(tmp_path)
    tables = (each.table(plan, levels(12)).coefficients for each in (forecaster, back))
    assert torch.equal(*tables)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda levels, gram: (levels.flip(0), gram), "not a decreasing list"),
        (lambda levels, gram: (levels[1:], gram), r"gram.cond is \[40, 40\] for 19"),
        (lambda levels, gram: (levels, gram * float("nan")), "not finite"),
        (lambda levels, gram: (levels, -gram), "holds no inner products"),
    ],
)
def test_damaged_moments_are_refused(tmp_path, change, told):
    forecaster = trained()
    moments = forecaster.moments
    moments.levels, moments.grams["cond"] = change(moments.levels, moments.grams["cond"])
    forecaster.save_pretrained(tmp_path)
    with pytest.raises(LesaError, match=told):
        LesaForecaster.from_pretrained(tmp_path)


def test_a_file_without_moments_is_read(tmp_path):
    LesaForecaster().save_pretrained(tmp_path)
    assert not any("moments" in name for name in load_file(tmp_path / "model.safetensors"))
    assert not LesaForecaster.from_pretrained(tmp_path).moments.grams


def told(schedule, sigmas, sampler="EulerDiscreteScheduler", noise=False):
    known = [Calibration(PLAN, SIGMAS)]
    return mismatch(known, "EulerDiscreteScheduler", schedule, sigmas, sampler, noise)


def test_each_kind_of_mismatch_names_its_values_and_the_remedy():
    assert told(PLAN, SIGMAS) is None
    assert mismatch([], "", PLAN, SIGMAS, "", True) is None
    assert told(Schedule.fora(1, 3), levels(3)) is None  # nothing is forecast
    steps = told(Schedule.fora(4, 12), levels(12))
    assert (
        steps.kind == "steps"
        and "num_inference_steps=12: the forecaster was trained for 20;" in (steps.told)
    )
    assert "lesa.train(pipe, prompts, num_inference_steps=12, full_steps=3)" in steps.told
    moved = told(PLAN, levels(20, 3.5), "UniPCMultistepScheduler")
    assert (
        moved.kind == "levels"
        and "UniPCMultistepScheduler: its noise levels are up to 0.03" in (moved.told)
    )
    other = told(Schedule.fora(5, 20), SIGMAS)
    assert other.kind == "list" and "full_steps=[0, 5, 10, 15]" in other.told
    assert "full_steps=4, schedule=...)" in other.told
    noisy = told(PLAN, SIGMAS, "EulerAncestralDiscreteScheduler", noise=True)
    assert noisy.kind == "noise" and "reuse the last full one" in noisy.told


def test_a_list_that_only_adds_full_steps_keeps_its_rows():
    forecaster = trained()
    more = Schedule.explicit([*PLAN.full_steps, 11], 20)
    found = forecaster.mismatch(more, SIGMAS)
    assert found.kind == "list" and "rows of one with fewer full steps are kept" in found.told
    kept = [step for step in more.skipped_steps if step < 11]
    rows = forecaster.table(more, SIGMAS).coefficients, forecaster.table(PLAN, SIGMAS).coefficients
    assert torch.equal(*(table[kept, :2] for table in rows))  # as the sentence says
    other = Schedule.explicit([0, 4, 8, 11, 14], 20)
    assert "are damped towards reuse" in forecaster.mismatch(other, SIGMAS).told


def test_noise_counts_only_where_training_had_none():
    forecaster = trained()
    assert forecaster.mismatch(PLAN, SIGMAS, "LCMScheduler", noise=True).kind == "noise"
    forecaster.metadata["noise"] = True
    assert forecaster.mismatch(PLAN, SIGMAS, "LCMScheduler", noise=True) is None
    del forecaster.metadata["noise"]  # as saved by an earlier lesa
    forecaster.metadata["scheduler"] = "LCMScheduler"
    assert forecaster.mismatch(PLAN, SIGMAS, "LCMScheduler", noise=True) is None


G, TRUE = "guidance_scale", "true_cfg_scale"


@pytest.mark.parametrize(
    ("trained", "scales", "kind", "found"),
    [
        ({G: 3.5}, {G: 7.0}, "embedded", (G, 2.0)),
        ({G: 3.5}, {G: 3.5}, "embedded", None),
        ({G: 3.5}, {G: 3.6}, "embedded", None),  # all but the same
        ({G: 3.5}, {G: 1.0}, "embedded", None),
        ({G: 0.5}, {G: 3.0}, "embedded", (G, 3.0)),
        ({"distilled_" + G: 3.0}, {"distilled_" + G: 6.0}, "embedded", ("distilled_" + G, 2.0)),
        # schnell is not told the scale that its pipeline takes
        ({G: 0.0}, {G: 3.5}, "", None),
        ({G: 3.5}, {G: 7.0}, "", None),
        ({TRUE: 4.0}, {TRUE: 5.0}, "before", (TRUE, 1.2)),  # calls of their own
        ({TRUE: 1.0}, {TRUE: 4.0}, "embedded", None),  # without a negative prompt it has no effect
        ({G: 5.0}, {G: 8.0}, "before now", (G, 1.6)),
        ({G: 1.0}, {G: 5.0}, "now", (G, 5.0)),  # trained without guidance
        ({G: 7.0}, {G: 5.0}, "now", (G, 5.0)),
        ({G: 4.0, G + "_2": 3.0}, {G: 5.0, G + "_2": 6.0}, "before", (G + "_2", 2.0)),
        ({G: 5.0}, {G: 5.0, G + "_2": 50.0}, "before", (G + "_2", 10.0)),
        ({G: 5.0}, {}, "before now", None),  # a loop of one's own
    ],
)
def test_more_guidance_than_in_training_is_seen(trained, scales, kind, found):
    told = (name in kind.split() for name in ("embedded", "before", "now"))
    most = excess(trained, scales, *told)
    assert (most and (most.name, pytest.approx(most.ratio))) == found


@pytest.mark.parametrize("parts", [1, 2])
def test_rows_are_damped_by_the_excess_of_guidance(parts):
    forecaster = trained()
    rows = 3 * reuse(PLAN, 4)
    rows[list(PLAN.skipped_steps), 3] = -2.0  # the latent
    split = rows[..., None].repeat(1, 1, parts)
    forecaster.correct(PLAN, SIGMAS, "cond", rows, split if parts > 1 else None)
    base = reuse(PLAN, 4)
    for ratio in (1.0, 1.2, 3.0):
        table = forecaster.table(PLAN, SIGMAS, guidance=ratio)
        expected = base + exp(-(ratio - 1) / OVER) * (rows - base)
        for part in range(parts):
            found = table.part(part).coefficients
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_guidance_of_earlier_forecasters_is_that_of_their_call():
    forecaster = trained()
    assert forecaster.excess({"guidance_scale": 9.0}, True) is None  # it says nothing
    forecaster.metadata["call"] = {"guidance_scale": "much"}  # by hand
    assert forecaster.excess({"guidance_scale": 9.0}, True) is None
    forecaster.metadata["call"] = {"guidance_scale": 3.0, "height": 64}
    assert forecaster.excess({"guidance_scale": 9.0}, True).ratio == 3
    forecaster.metadata["guidance"] = {"guidance_scale": 4.5}
    assert forecaster.excess({"guidance_scale": 9.0}, True).ratio == 2


@pytest.fixture(scope="module")
def flux():
    pipe, call = load("flux"), settings("flux")
    plan, seen = Schedule.explicit((0, 2, 5, 9, 13), 16), prompts("flux", 4, split="train")
    forecaster = lesa.train(
        pipe, seen, 16, 5, form="table", schedule=plan, call=call, polish=0, progress=False
    )
    return pipe, call, forecaster


def runs(flux, steps, *how, guidance=3.5, **more):
    """Latents of three unseen prompts, and the full steps that were taken."""
    pipe, call, _ = flux
    call = {**call, "guidance_scale": guidance}
    lesa.disable(pipe)
    if how:
        lesa.enable(pipe, *how, **more)
    noise = [torch.Generator().manual_seed(i) for i in range(3)]
    texts = prompts("flux", 3, seed=5)
    arguments = {**call, "num_inference_steps": steps, "output_type": "latent"}
    with torch.no_grad():
        found = pipe(texts, generator=noise, **arguments)[0]
    full = lesa.stats(pipe).full_steps if how else ()
    lesa.disable(pipe)
    return found, full


def decibels(found, plain):
    error = (found - plain).square().flatten(1).mean(1)
    return float(-10 * torch.log10(error / plain.square().flatten(1).mean(1)).mean())


@pytest.mark.parametrize(
    ("steps", "chosen"),
    [
        (9, {"full_steps": 5}),
        (12, {"schedule": Schedule.fora(3)}),
        (24, {"full_steps": 5}),
        (40, {"schedule": Schedule.fora(5)}),
    ],
    ids=str,
)
def test_no_other_step_count_is_below_reuse(flux, steps, chosen):
    plain, _ = runs(flux, steps)
    with pytest.warns(UserWarning, match=f"num_inference_steps={steps}: .* trained for 16;"):
        ours, full = runs(flux, steps, flux[2], **chosen)
    reused, _ = runs(flux, steps, lesa.Reuse(), schedule=Schedule.explicit(full, steps))
    assert decibels(ours, plain) > decibels(reused, plain) - 0.5


def test_the_warning_comes_once(flux):
    pipe, call, forecaster = flux
    arguments = {**call, "num_inference_steps": 12, "output_type": "latent"}
    with lesa.accelerate(pipe, forecaster, full_steps=5):
        with pytest.warns(UserWarning, match="num_inference_steps=12"):
            pipe("a", **arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            pipe("another", **arguments)
            pipe("another", **{**arguments, "num_inference_steps": 16})


def test_a_sampler_that_adds_noise_reuses(flux):
    pipe, _, forecaster = flux
    own = pipe.scheduler
    pipe.scheduler = type(own).from_config(own.config, stochastic_sampling=True)
    try:
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match="adds noise.*reuse the last full one"):
            ours, full = runs(flux, 16, forecaster, full_steps=5)
        torch.manual_seed(0)
        reused, _ = runs(flux, 16, lesa.Reuse(), schedule=Schedule.explicit(full, 16))
    finally:
        pipe.scheduler = own
    assert torch.equal(ours, reused)


def test_guidance_above_that_of_the_training_is_told_and_damped(flux):
    pipe, call, forecaster = flux
    assert forecaster.metadata["guidance"] == {"guidance_scale": 3.5, "true_cfg_scale": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        runs(flux, 16, forecaster, guidance=2.0)
    plain, _ = runs(flux, 16, guidance=5.0)
    with pytest.warns(UserWarning, match=r"guidance_scale=5: .* trained at 3\.5; .*lesa\.train"):
        ours, full = runs(flux, 16, forecaster, guidance=5.0)
    reused, _ = runs(flux, 16, lesa.Reuse(), schedule=Schedule.explicit(full, 16), guidance=5.0)
    forecaster.metadata["guidance"] = {}
    undamped, _ = runs(flux, 16, forecaster, guidance=5.0)
    forecaster.metadata["guidance"] = {"guidance_scale": 3.5, "true_cfg_scale": 1.0}
    assert decibels(ours, plain) > decibels(reused, plain)
    assert decibels(ours, plain) > decibels(undamped, plain)
