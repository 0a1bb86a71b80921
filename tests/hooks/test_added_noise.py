import diffusers
import pytest
import torch

from lesa.hooks.added_noise import adds_noise, is_multistep

EPSILON = (
    ("DDIMScheduler", {}),
    ("DDPMScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverSinglestepScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("LCMScheduler", {}),
    ("PNDMScheduler", {}),
    ("SASolverScheduler", {}),
    ("TCDScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
)


def end(scheduler, seed, **more):
    """Where four steps lead, with noise from one seed."""
    scheduler.set_timesteps(4)
    torch.manual_seed(seed)
    sample = torch.ones(1, 4, 8, 8)
    for time in scheduler.timesteps:
        found = scheduler.step(torch.full_like(sample, 0.3), time, sample, **more)
        sample = found.prev_sample
    return sample


@pytest.mark.parametrize(("name", "config"), EPSILON, ids=str)
def test_it_tells_what_two_seeds_tell(name, config):
    scheduler = getattr(diffusers, name)(**config)
    differ = not torch.equal(end(scheduler, 1), end(scheduler, 2))
    assert adds_noise(scheduler, {}) == differ


def after_other_outputs(scheduler, first):
    """Where steps lead from one latent and one output, each after another output."""
    scheduler.set_timesteps(6)
    sample, found = torch.ones(1, 4, 8, 8), []
    for output, time in zip((first, 0.3, first, 0.3, 0.3), scheduler.timesteps, strict=False):
        torch.manual_seed(0)
        found += scheduler.step(torch.full_like(sample, output), time, sample).prev_sample
    return torch.stack([found[1], found[3], found[4]])


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *EPSILON,
        ("DPMSolverMultistepScheduler", {"solver_order": 1}),
        ("IPNDMScheduler", {}),
    ],
    ids=str,
)
def test_a_multistep_sampler_remembers_outputs(name, config):
    scheduler = getattr(diffusers, name)(**config)
    remembers = not torch.equal(
        after_other_outputs(scheduler, 0.1), after_other_outputs(scheduler, 0.9)
    )
    assert is_multistep(scheduler) == remembers


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_eta_of_the_call_counts(eta):
    scheduler = diffusers.DDIMScheduler()
    differ = not torch.equal(end(scheduler, 1, eta=eta), end(scheduler, 2, eta=eta))
    assert adds_noise(scheduler, {"eta": eta}) == differ == bool(eta)
