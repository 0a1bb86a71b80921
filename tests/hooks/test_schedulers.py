"""Every scheduler of diffusers is followed step by step, or there is one true sentence why not."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
from published_schedulers import OTHERS, TINY, Published

from lesa.hooks.noise_levels import noise_levels
from lesa.hooks.step_clock import StepClock

STEPS = 6
# What a scheduler cannot be made without, or not be given timesteps.
NEEDED = {
    "AmusedScheduler": {"mask_token_id": 7},
    "VQDiffusionScheduler": {"num_vec_classes": 16},
    "RFD4ProteinaScheduler": {
        "schedule_mode": "power",
        "noise_mode": "1/t",
        "tsr_k": 1.0,
        "tsr_sigma": 1.0,
    },
    "HeliosScheduler": {"stages": 1},
    "HeliosDMDScheduler": {"stages": 1},
}
# The schedulers whose noise levels do not fall, and how that is said; all others have levels.
WITHOUT_LEVELS = {
    "AmusedScheduler": "are not known",
    "BlockRefinementScheduler": "are not known",
    "DDIMInverseScheduler": "rise",
    "DDPMWuerstchenScheduler": "are not known",
    "DPMSolverMultistepInverseScheduler": "rise",
    "DiscreteDDIMScheduler": "are not known",
    "EntropyBoundScheduler": "are not known",
    "PNDMScheduler": "repeat",
    "RFD4ProteinaScheduler": "are not known",
    "ScoreSdeVeScheduler": "are not known",
    "VQDiffusionScheduler": "are not known",
}
TWICE = {
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KarrasVeScheduler",
    "DPMSolverSDEScheduler",
}


def schedulers():
    """The names of all that diffusers can make here: some need other packages."""
    for name in sorted(vars(diffusers)["_import_structure"]["schedulers"]):
        kind = getattr(diffusers, name)
        if type(kind).__name__ != "DummyObject" and "set_timesteps" in dir(kind):
            yield name


def published():
    yield from ((f"tiny {name}", entry) for name, entry in TINY.items())
    yield from OTHERS.items()
    yield from ((name, Published(name, NEEDED.get(name, {}), "its defaults")) for name in ALL)


ALL = [name for name in schedulers()]
CASES = dict(published())


def begun(entry):
    """A scheduler at the beginning of a run, begun as its pipelines do."""
    scheduler, given = entry.make(), {"num_inference_steps": STEPS}
    if entry.scheduler == "RFD4ProteinaScheduler":  # ten steps in two parts at the end
        given["num_inference_steps"] = 24
    if entry.scheduler == "SCMScheduler":
        given["intermediate_timesteps"] = None
    if scheduler.config.get("use_dynamic_shifting", False):
        given["mu"] = 1.0
    if scheduler.config.get("num_train_timesteps") == 1:
        given["sigmas"] = [1 - i / STEPS for i in range(STEPS)]
        known = inspect.signature(scheduler.set_timesteps).parameters
        given = {name: value for name, value in given.items() if name in known}
    scheduler.set_timesteps(**given)
    return scheduler


def followed(scheduler):
    """The clock's steps of a whole run, the scheduler's own `step` after each."""
    clock, found = StepClock(scheduler=scheduler), []
    with_end = type(scheduler).__name__ in ("SCMScheduler", "DDPMWuerstchenScheduler")
    times = scheduler.timesteps[:-1] if with_end else scheduler.timesteps
    sample = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    for index, time in enumerate(times):
        found.append(clock.tick({"timestep": time}))
        if hasattr(scheduler, "step_index"):
            advance(scheduler, index, time, sample)
    return found


def advance(scheduler, index, time, sample):
    """`scheduler.step` with what it needs."""
    known = inspect.signature(scheduler.step).parameters
    output, times = sample, scheduler.timesteps
    more = {
        "emit_mask": torch.ones(1, 4),
        "cur_sampling_step": index,
        "dmd_noisy_tensor": sample,
        "dmd_sigmas": scheduler.sigmas if hasattr(scheduler, "sigmas") else None,
        "dmd_timesteps": times,
        "all_timesteps": times,
    }
    if type(scheduler).__name__ == "PiflowScheduler":  # several velocities of each channel
        output = sample.repeat(1, 1, 1, scheduler.n_grid)
    more = {name: value for name, value in more.items() if name in known}
    scheduler.step(output, time, sample, **more)


def test_all_schedulers_are_here():
    assert len(ALL) >= 44 and set(WITHOUT_LEVELS) <= set(ALL) | {"DPMSolverSDEScheduler"}


@pytest.mark.parametrize("name", CASES)
def test_a_scheduler_is_followed_or_says_why_not(name):
    entry = CASES[name]
    scheduler = begun(entry)
    found = followed(scheduler)
    if entry.scheduler in TWICE:
        assert {step.problem for step in found} == {"scheduler of order 2"}
        return
    assert [step.index for step in found] == list(range(len(found)))
    assert {step.problem for step in found} == {None}
    assert {step.num_steps for step in found} == {len(found)}
    assert [step.fresh for step in found] == [True] + [False] * (len(found) - 1)
    why, levels = found[0].generation.levels_problem, found[0].sigmas
    reason = WITHOUT_LEVELS.get(entry.scheduler)
    if reason is None:
        assert why is None and len(levels) == len(found) + 1
        assert all(1 >= a > b >= 0 for a, b in zip(levels, levels[1:], strict=False))
    else:
        assert levels == () and why == f"the noise levels of {entry.scheduler} {reason}"


def levels(name, **options):
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(STEPS)
    return noise_levels(scheduler, 0, STEPS)


def test_an_inverted_schedulers_levels_are_those_of_the_plain_one():
    """What it calls sigma is the share of signal."""
    plain = levels("FlowMatchEulerDiscreteScheduler", shift=3.0)
    inverted = levels("FlowMatchEulerDiscreteScheduler", shift=3.0, invert_sigmas=True)
    assert inverted == pytest.approx(plain, abs=1e-6)
    assert inverted[0] == 1.0 and inverted[-1] == 0.0


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler"])
def test_zero_terminal_snr_is_the_level_one(name):
    spaced = {} if name in ("LCMScheduler", "TCDScheduler") else {"timestep_spacing": "trailing"}
    found = levels(name, rescale_betas_zero_snr=True, **spaced)
    assert found[0] == 1.0 and 0 < found[1] < 1


def test_a_last_level_above_zero_is_kept_unless_it_repeats():
    """A last step to the same level, as Cosmos makes it, ends at 0: no forecast is made there."""
    euler = "EulerDiscreteScheduler"
    zero, same = levels(euler), levels(euler, final_sigmas_type="sigma_min")
    assert same == zero and same[-1] == 0.0
    assert levels("DEISMultistepScheduler")[-1] == pytest.approx(0.0099, abs=1e-4)


def test_angles_are_levels():
    """In trigonometric flow a time is the angle between signal and noise."""
    scheduler = diffusers.SCMScheduler()
    scheduler.set_timesteps(2, max_timesteps=torch.pi / 2, intermediate_timesteps=torch.pi / 4)
    assert noise_levels(scheduler, 0, 2) == pytest.approx((1.0, 0.5, 0.0))


def test_sigmas_that_are_not_those_of_the_run_are_no_levels():
    """The 2000 of training, say, where a pipeline forgot to set them."""
    scheduler = diffusers.ScoreSdeVeScheduler()
    scheduler.set_timesteps(STEPS)
    assert noise_levels(scheduler, 0, STEPS) is None
    scheduler.set_sigmas(STEPS)
    assert noise_levels(scheduler, 0, STEPS) is not None
