"""enable, disable, stats, accelerate, and what they say about wrong options."""

from __future__ import annotations

import subprocess
import sys
import warnings
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

import lesa
from lesa import LesaConfig, LesaError, LesaForecaster, Reuse, Schedule, Taylor
from lesa.forecasters.prior import prior_schedule
from lesa.hooks.attach import attach


def test_import_is_light():
    """No torch, diffusers, triton or nvtx is imported by `import lesa`."""
    code = (
        "import sys, lesa; lesa.__version__; "
        "bad = {'torch', 'diffusers', 'triton', 'nvtx'} & set(sys.modules); "
        "assert not bad, bad; assert 'enable' in dir(lesa)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there():
    assert all(getattr(lesa, name) is not None for name in lesa.__all__)
    assert set(lesa.__all__) <= set(dir(lesa))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lesa.nothing


def test_a_second_enable_replaces_the_first(tiny_flux, inputs):
    lesa.enable(tiny_flux, Reuse(), schedule=Schedule.every(4), tap="hidden")
    tiny_flux(**inputs())
    lesa.enable(tiny_flux, Taylor(2), schedule=Schedule.explicit([0, 1, 2]), tap="output")
    found = lesa.stats(tiny_flux)
    assert (found.full, found.forecaster, found.tap) == (0, "taylor-2", "output")
    tiny_flux(**inputs())
    assert lesa.stats(tiny_flux).full == 3
    lesa.disable(tiny_flux)
    assert type(tiny_flux.transformer) is diffusers.FluxTransformer2DModel
    lesa.disable(tiny_flux)


def test_stats_are_readable_and_json(tiny_flux, inputs):
    lesa.enable(tiny_flux, full_steps=4)
    tiny_flux(**inputs())
    found = lesa.stats(tiny_flux)
    assert (found.full, found.skipped, found.generations) == (4, 8, 1)
    assert found.to_dict()["full_steps"] == list(found.full_steps)
    assert len(found.full_steps) == 4 and found.num_steps == 12
    assert found.seconds_full > 0 and found.seconds_skipped > 0
    assert "4 of 12 full" in str(found) and "lesa-untrained" in str(found)
    tiny_flux(**inputs())
    assert found.full == 4  # a snapshot


def test_accelerate_restores_what_was_there(tiny_flux, inputs):
    plain = tiny_flux(**inputs()).images
    with lesa.accelerate(tiny_flux, full_steps=3) as pipe:
        assert pipe is tiny_flux
        assert not torch.equal(pipe(**inputs()).images, plain)
    assert torch.equal(tiny_flux(**inputs()).images, plain)
    with pytest.raises(RuntimeError), lesa.accelerate(tiny_flux, full_steps=3):
        raise RuntimeError
    assert not tiny_flux.transformer.is_cache_enabled
    lesa.enable(tiny_flux, Reuse(), full_steps=6)
    tiny_flux(**inputs())
    with lesa.accelerate(tiny_flux, full_steps=3):
        assert lesa.stats(tiny_flux).full == 0
    assert lesa.stats(tiny_flux).full == 6


@pytest.mark.parametrize("count", range(1, 13))
def test_a_count_of_full_steps_is_met(tiny_flux, inputs, count):
    schedule = LesaConfig(LesaForecaster(), full_steps=count).bound_schedule(12)
    assert len(schedule.full_steps) == count and schedule.num_steps == 12
    published = LesaConfig(full_steps=count).bound_schedule(12)  # of Taylor: never fewer
    assert count <= len(published.full_steps) and published.num_steps == 12


def test_counts_follow_the_papers_lists_where_it_has_one():
    for count, interval in ((13, 5), (10, 7), (8, 10)):
        config = LesaConfig(LesaForecaster(), full_steps=count)
        assert config.bound_schedule(50) == Schedule.every(interval, 50)
    assert LesaConfig().bound_schedule(50) == prior_schedule(10, 50)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"full_steps": 0}, "full_steps=0"),
        ({"full_steps": [0, 1]}, "schedule=Schedule.explicit"),
        ({"full_steps": True}, "not a count"),
        ({"full_steps": 3, "schedule": Schedule.every(3)}, "exclude each other"),
        ({"schedule": [0, 1]}, "not a Schedule; give one"),
        ({"tap": "middle"}, "tap='middle'"),
        ({"graph": "always"}, "graph='always'"),
        ({"forecaster": "taylor"}, "forecaster='taylor'.*did you mean 'taylor-"),
        ({"forecaster": None}, "forecaster=None: a NoneType"),
        (
            {"forecaster": SimpleNamespace(table=1, history=1, name="")},
            "no uses_latent and no tap;",
        ),
        ({"forecaster": Taylor}, "forecaster=.*: the class Taylor"),
        ({"full_steps": torch.ones(2)}, "full_steps=a tensor"),
        ({"full_steps": 2.0}, "full_steps=2.0"),
        ({"full_steps": 10**30}, "full_steps=10"),
        ({"tap": ["output"]}, "tap="),
        ({"graph": torch.ones(2)}, "graph=a tensor"),
        *(
            ({"num_inference_steps": wrong}, "num_inference_steps=")
            for wrong in (0, True, 2.5, "8", 10**30, torch.ones(2), [8])
        ),
        *(
            ({"sigmas": wrong}, "sigmas")
            for wrong in (
                1.0,
                "levels",
                [1, None, 0],
                [[1.0], [0.0]],
                [1, float("nan")],
                [0, 1],
                [],
            )
        ),
        ({"sigmas": [1, 0.5, 0], "num_inference_steps": 8}, "sigmas=.*: 3 values"),
        ({"scheduler": "euler"}, "scheduler='euler': a str"),
        ({"forecaster": Taylor(tap="hidden"), "tap": "output"}, "made for 'hidden'"),
        ({"full_steps": 9, "num_inference_steps": 8}, "at most 8"),
        ({"schedule": Schedule.explicit([0, 9]), "num_inference_steps": 8}, "step 9"),
    ],
)
def test_wrong_options_name_the_field_and_the_remedy(options, message):
    with pytest.raises(LesaError, match=message):
        LesaConfig(**options)


def test_numbers_of_numpy_are_taken():
    config = LesaConfig(full_steps=np.int64(3), num_inference_steps=torch.tensor(8))
    assert (config.full_steps, config.num_inference_steps) == (3, 8)
    assert type(config.full_steps) is int
    assert LesaConfig(sigmas=np.linspace(1, 0, 5)).sigmas == (1.0, 0.75, 0.5, 0.25, 0.0)


def test_a_forecaster_by_its_name_or_folder(tiny_flux, inputs, tmp_path):
    LesaForecaster(metadata={"model_class": "FluxTransformer2DModel"}).save_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path), "fora", "taylor-2"):
        lesa.enable(tiny_flux, source, full_steps=4)
        tiny_flux(**inputs())
        found = lesa.stats(tiny_flux)
        assert found.skipped > 0
        assert found.forecaster == (source if source in ("fora", "taylor-2") else "lesa")
    with lesa.accelerate(tiny_flux, "taylor-1", full_steps=4):
        assert lesa.stats(tiny_flux).forecaster == "taylor-1"
    assert LesaConfig("foca").forecaster.name.startswith("foca")
    with pytest.raises(LesaError, match="did you mean 'spectrum'.*fora, taylor-0"):
        lesa.enable(tiny_flux, "spektrum")
    with pytest.raises(LesaError, match="only a Hub repository"):
        lesa.enable(tiny_flux, Taylor(), revision="main")


def test_wrong_targets(tiny_flux):
    with pytest.raises(LesaError, match="has no denoiser"):
        lesa.enable(object())
    with pytest.raises(LesaError, match="not accelerated"):
        lesa.stats(tiny_flux)
    with pytest.raises(LesaError, match="give a lesa.LesaConfig"):
        lesa.apply_lesa_cache(tiny_flux.transformer, {"full_steps": 3})
    with pytest.raises(LesaError, match="does not name its arguments"):
        lesa.enable(torch.nn.Module())
    for module in (torch.nn.Linear(2, 2), tiny_flux.transformer.norm_out.norm):
        with pytest.raises(LesaError, match="forward takes 'input' alone, so it is no denoiser"):
            lesa.enable(module)
    with pytest.raises(LesaError, match="tap='hidden': Bilinear does not have it"):
        lesa.enable(torch.nn.Bilinear(2, 2, 2), tap="hidden")


def test_another_cache_or_controller_is_not_replaced(tiny_flux):
    tiny_flux.transformer.enable_cache(diffusers.FirstBlockCacheConfig())
    with pytest.raises(LesaError, match="disable_cache"):
        lesa.enable(tiny_flux)
    tiny_flux.transformer.disable_cache()
    attach(tiny_flux.transformer, lambda denoiser, args, kwargs: None, tiny_flux)
    with pytest.raises(LesaError, match="at work"):
        lesa.enable(tiny_flux)


def test_diffusers_own_way(tiny_flux, inputs):
    lesa.patch_diffusers()
    lesa.patch_diffusers()  # twice is harmless
    model, scheduler = tiny_flux.transformer, tiny_flux.scheduler
    plain = tiny_flux(**inputs()).images
    model.enable_cache(LesaConfig(Reuse(), full_steps=4, scheduler=scheduler))
    assert model.is_cache_enabled and isinstance(model._cache_config, LesaConfig)
    tiny_flux(**inputs())
    assert lesa.stats(model).skipped == 8
    with pytest.raises(ValueError, match="already been enabled"):
        model.enable_cache(LesaConfig())
    model.disable_cache()
    assert not model.is_cache_enabled
    model.enable_cache(diffusers.FirstBlockCacheConfig())
    model.disable_cache()
    assert torch.equal(tiny_flux(**inputs()).images, plain)


def sigmas(pipe, inputs):
    pipe(**inputs())
    return pipe.scheduler.sigmas.tolist()


def test_a_trained_forecaster_brings_its_own_schedules(tiny_flux, inputs):
    levels = sigmas(tiny_flux, inputs)
    forecaster = LesaForecaster()
    for full in ([0, 2, 5, 9], [0, 3, 7]):
        schedule = Schedule.explicit(full, 12)
        rows = forecaster.table(schedule, levels).coefficients
        forecaster.correct(schedule, levels, "cond", rows)
    lesa.enable(tiny_flux, forecaster, full_steps=3)
    tiny_flux(**inputs())
    assert lesa.stats(tiny_flux).full_steps == (0, 3, 7)
    lesa.enable(tiny_flux, forecaster)
    tiny_flux(**inputs())
    found = lesa.stats(tiny_flux)
    assert (found.full_steps, found.skipped, found.fallbacks) == ((0, 2, 5, 9), 8, {})
    with pytest.warns(
        UserWarning, match="only 4 and 3: it runs as 4 with 1 more full.*quality.*full_steps=5"
    ):
        lesa.enable(tiny_flux, forecaster, full_steps=5)
    tiny_flux(**inputs())
    found = lesa.stats(tiny_flux)
    assert (len(found.full_steps), found.full, found.fallbacks) == (5, 5, {})
    assert set(found.full_steps) > {0, 2, 5, 9}
    for count in (2, 9):
        with pytest.warns(
            UserWarning, match=f"full_steps={count} was not.*spread anew.*not fitted"
        ):
            lesa.enable(tiny_flux, forecaster, full_steps=count)
        tiny_flux(**inputs())
        assert lesa.stats(tiny_flux).full == count
    lesa.enable(tiny_flux, LesaForecaster(), full_steps=5)
    tiny_flux(**inputs())
    assert lesa.stats(tiny_flux).full == 5


def test_a_forecaster_for_another_model_is_refused(tiny_flux):
    from lesa.training.job import weights_hash

    own = {"model_class": "FluxTransformer2DModel"}
    lesa.enable(tiny_flux, LesaForecaster(metadata=own))
    lesa.disable(tiny_flux)
    with pytest.raises(LesaError, match="SanaTransformer2DModel.*FluxTransformer2DModel"):
        lesa.enable(tiny_flux, LesaForecaster(metadata={"model_class": "SanaTransformer2DModel"}))
    digest = weights_hash(tiny_flux.transformer)
    lesa.enable(tiny_flux, LesaForecaster(metadata={**own, "model_hash": digest}))
    with pytest.warns(UserWarning, match=f"feedbeef.*{digest}"):  # fine-tuned: perhaps it serves
        lesa.enable(tiny_flux, LesaForecaster(metadata={**own, "model_hash": "feedbeef"}))
    with pytest.raises(LesaError, match="hidden"):
        lesa.enable(tiny_flux, LesaForecaster(), tap="hidden")


def test_all_doubts_make_one_warning(tiny_flux, inputs):
    levels = sigmas(tiny_flux, inputs)
    forecaster = LesaForecaster(metadata={"model_hash": "feedbeef"})
    forecaster.recommend(Schedule.explicit([0, 3, 7], 12), levels)
    config = LesaConfig(forecaster, full_steps=4, scheduler=tiny_flux.scheduler)
    for call in (
        lambda: lesa.enable(tiny_flux, forecaster, full_steps=4),
        lambda: lesa.accelerate(tiny_flux, forecaster, full_steps=4).__enter__(),
        lambda: lesa.apply_lesa_cache(tiny_flux.transformer, config),
    ):
        with pytest.warns(UserWarning) as told:
            call()
        (warning,) = told
        assert "feedbeef" in str(warning.message) and "full_steps=4" in str(warning.message)
        assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lesa.enable(tiny_flux, Taylor(), full_steps=4)


def test_a_learned_forecaster_in_ones_own_loop_needs_noise_levels(tiny_flux):
    with pytest.raises(LesaError, match="sigmas=None"):
        lesa.apply_lesa_cache(
            tiny_flux.transformer, LesaConfig(LesaForecaster(), num_inference_steps=12)
        )


@pytest.mark.filterwarnings("ignore:full_steps=")
@pytest.mark.parametrize("steps", [8, 3, 2, 1])
def test_a_run_of_few_steps_still_skips(tiny_flux, inputs, steps):
    """Fewer steps than calibrated full ones: the same share of them, and no fallback."""
    forecaster = LesaForecaster()
    levels = [1 - i / 50 for i in range(51)]
    forecaster.recommend(Schedule.every(7, 50), levels)  # 10 full steps
    for count in (None, *range(1, steps)):
        lesa.enable(tiny_flux, forecaster, full_steps=count)
        tiny_flux(**inputs(steps=steps))
        found = lesa.stats(tiny_flux)
        assert found.full == (count or max(1, round(10 * steps / 50)))
        assert (found.skipped, found.fallbacks) == (steps - found.full, {})
