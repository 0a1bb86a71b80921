"""Other solvers and other noise levels: against the plain run, closed forms and diffusers' own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny_pipelines import build, run

from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.evaluation import Bench
from lesa.evaluation import build as method
from lesa.evaluation.methods import parse
from lesa.evaluation.peers.solvers import sampler

PIPELINES = ("flux", "qwen", "hunyuan-video", "sdxl")
DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"


@pytest.fixture(scope="module", params=PIPELINES)
def tiny(request):
    pipe, call = build(request.param)
    return pipe, call, run(pipe, call())


def test_all_steps_of_the_own_sampler_are_the_plain_run(tiny):
    pipe, call, plain = tiny
    own = pipe.scheduler
    with sampler(pipe, steps=range(6)) as use:
        assert torch.equal(run(pipe, call()), plain)
        assert use.cache_bytes() == 0
    assert pipe.scheduler is own
    assert torch.equal(run(pipe, call()), plain)


@pytest.mark.parametrize("steps", [None, (0, 1, 4)])
def test_first_order_dpm_is_euler(tiny, steps):
    """Data prediction of order 1, x' = (s'/s) x + (a' - a s'/s) x0, is Euler's step, in flow time
    as in the sigmas of noise prediction."""
    pipe, call, plain = tiny
    with sampler(pipe, steps=steps):
        euler = run(pipe, call())
    with sampler(pipe, DPM, steps, solver_order=1):
        first_order = run(pipe, call())
    torch.testing.assert_close(first_order, euler, rtol=1e-4, atol=1e-4 * float(plain.std()))
    with sampler(pipe, DPM, steps):
        assert (run(pipe, call()) - euler).std() > 1e-3 * plain.std()


@pytest.mark.parametrize("solver", [None, DPM, UNIPC])
def test_thinned_levels_are_those_of_the_plain_run(tiny, solver):
    pipe, call, _ = tiny
    own = pipe.scheduler
    run(pipe, call())
    sigmas, timesteps = own.sigmas.clone(), own.timesteps.clone()
    with sampler(pipe, solver, (0, 2, 5)):
        run(pipe, call())
        torch.testing.assert_close(pipe.scheduler.sigmas, sigmas[[0, 2, 5, 6]], rtol=0, atol=2e-6)
        assert torch.equal(pipe.scheduler.timesteps, timesteps[[0, 2, 5]])
        assert pipe.scheduler.sigmas[-1] == 0


def integrate(scheduler, velocity, x):
    """The scheduler's own loop over x' = velocity(x, sigma)."""
    for sigma, t in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        x = scheduler.step(velocity(x, float(sigma)), t, x, return_dict=False)[0]
    return x


def gaussian(x, sigma, spread=0.3):
    """Velocity of flow matching to N(0, spread^2); exact path x(sigma) = x(1) std(sigma)."""
    variance = (1 - sigma) ** 2 * spread**2 + sigma**2
    return x * (sigma - (1 - sigma) * spread**2) / variance


@pytest.mark.parametrize("solver", [DPM, UNIPC])
def test_second_order_solvers_are_nearer_to_the_exact_solution(solver):
    x = torch.linspace(-2, 2, 64, dtype=torch.float64).reshape(1, 64)
    errors = []
    for name in (None, solver):
        pipe = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler())
        with sampler(pipe, name):
            pipe.scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 21)[:-1].tolist())
            errors.append(float((integrate(pipe.scheduler, gaussian, x) - 0.3 * x).abs().max()))
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize(
    ("solver", "kind"), [(DPM, DPMSolverMultistepScheduler), (UNIPC, UniPCMultistepScheduler)]
)
def test_flow_convention_is_diffusers_own(solver, kind):
    """With the levels of diffusers' `use_flow_sigmas`, the same numbers come out."""
    theirs = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    theirs.set_timesteps(8)
    x = torch.linspace(-2, 2, 64, dtype=torch.float64).reshape(1, 64)
    pipe = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler())
    with sampler(pipe, solver):
        pipe.scheduler.set_timesteps(sigmas=theirs.sigmas[:-1].tolist())
        ours = integrate(pipe.scheduler, gaussian, x)
    torch.testing.assert_close(ours, integrate(theirs, gaussian, x), rtol=1e-5, atol=1e-6)


def test_methods_and_their_labels():
    pipe, call = build("flux")
    bench = Bench(6, pipe, call())
    own = method("fewer-steps-dpm++", 3, bench)
    assert (own.num_steps, own.schedule_text, own.label) == (
        3,
        "own: 3 steps",
        "fewer-steps-dpm++ @3",
    )
    searched = method("fewer-steps", 3, bench, searched=Schedule.explicit((0, 1, 4)))
    assert (searched.num_steps, searched.schedule_text) == (6, "searched: 0,1,4")
    with searched.applied(pipe):
        thinned = run(pipe, call())
    with pytest.raises(AssertionError):
        torch.testing.assert_close(thinned, run(pipe, call(num_inference_steps=3)))


@pytest.mark.parametrize("other", [DDIMScheduler, HeunDiscreteScheduler])
def test_other_kinds_of_scheduler_are_refused(other):
    pipe = SimpleNamespace(scheduler=other())
    with pytest.raises(LesaError, match=f"'fewer-steps-unipc': it needs .* not {other.__name__}"):
        parse("fewer-steps-unipc", Bench(6, pipe))
    with pytest.raises(LesaError, match="cannot be stepped otherwise"), sampler(pipe):
        pass


def test_a_list_beyond_the_run_is_refused():
    pipe, call = build("flux")
    own = pipe.scheduler
    with pytest.raises(LesaError, match="7 is beyond the run's 6 steps"), sampler(pipe, None, (7,)):
        run(pipe, call())
    assert pipe.scheduler is own
