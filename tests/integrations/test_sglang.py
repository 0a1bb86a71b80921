"""Both seams of SGLang's diffusion runtime, against lesa at the hidden tap.

SGLang is not installed here: the DiT below has the two seams in the words of its files
runtime/cache/base.py and runtime/cache/dpcache.py, around the blocks of diffusers' FLUX.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lesa.errors import LesaError
from lesa.integrations.sglang import Cache, State, states
from tests.integrations.captured import FULL, STEPS, captured, loop, trained, under_lesa


@pytest.fixture(scope="module")
def case():
    case = captured()
    case.forecaster = trained(case.levels, tap="hidden")
    case.own = under_lesa(case, case.forecaster, graph="off")
    return case


class DiT:
    """diffusers' transformer, which asks its `cache` or the batch's states around its blocks."""

    def __init__(self, case, cache=None):
        self.transformer, self.cache, self.blocks = case.pipe.transformer, cache, 0
        self.context = SimpleNamespace(forward_batch=None, current_timestep=0)

    def __call__(self, batch, step, **kwargs):
        self.context.forward_batch, self.context.current_timestep = batch, step
        return self._run(kwargs)

    def _run(self, kwargs):
        if self.cache is not None:
            self.cache.maybe_reset()
            skip = self.cache.should_skip()
            forecast = self.cache.read if skip else None
        else:
            state, step = self.context.forward_batch.dpcache_states, self.context.current_timestep
            state = state[self.context.forward_batch.is_cfg_negative]
            skip = not state.is_full_step(step)
            forecast = (lambda hidden: state.predict(step)) if skip else None
        self.blocks += not skip

        def tail(module, args):
            """What the last norm gets: the blocks' output, or in its place the forecast."""
            hidden, *others = args
            if forecast is not None:
                return (forecast(hidden), *others)
            if self.cache is not None:
                self.cache.write(hidden, None)
            else:
                state.record(step, hidden)

        handle = self.transformer.norm_out.register_forward_pre_hook(tail)
        try:
            return self.transformer(**kwargs, return_dict=False)[0]
        finally:
            handle.remove()


class Request:
    """What SGLang keeps of a request."""

    def __init__(self, case):
        self.num_inference_steps, self.scheduler = STEPS, case.pipe.scheduler
        self.do_classifier_free_guidance, self.is_cfg_negative = True, False
        self.dpcache_states = None


def generate(case, dit, request, before=lambda: None):
    def predict(step, latents, time, cond):
        if not step and cond is case.conds[0]:
            before()
        request.is_cfg_negative = cond is case.conds[1]
        times = time.expand(len(latents)) / 1000
        return dit(request, step, hidden_states=latents, timestep=times, **cond)

    return loop(case, predict, case.pipe.scheduler)


def test_a_diffusion_cache_makes_the_pictures_of_lesa(case):
    cache = Cache(case.forecaster, context=lambda: dit.context, full_steps=3)
    dit = DiT(case, cache)
    found = [generate(case, dit, Request(case)) for _ in range(2)]
    torch.testing.assert_close(found[0], case.own, rtol=0, atol=2e-5)  # other order of fp32 sums
    assert torch.equal(*found)
    assert dit.blocks == 2 * 2 * 3


def test_states_of_dpcache_make_them_too(case):
    request, dit = Request(case), DiT(case)

    def begin():
        request.dpcache_states = states(request, case.forecaster, schedule=FULL)

    found = generate(case, dit, request, begin)
    torch.testing.assert_close(found, case.own, rtol=0, atol=2e-5)
    counts = [(each.num_full, each.num_predicted) for each in request.dpcache_states.values()]
    assert counts == [(3, STEPS - 3)] * 2
    assert request.dpcache_states[True].full_steps == {0, 1, 4}


def test_levels_of_a_request_without_a_scheduler(case):
    request = SimpleNamespace(num_inference_steps=STEPS, sigmas=case.levels[:-1])
    (only,) = states(request, case.forecaster, schedule=FULL).values()
    assert isinstance(only, State) and only.num_steps == STEPS
    with pytest.raises(LesaError, match="neither a scheduler with sigmas nor sigmas"):
        states(SimpleNamespace(num_inference_steps=STEPS))


def test_mistakes_are_one_sentence(case):
    with pytest.raises(LesaError, match="SGLang keeps what the blocks return; train one with"):
        Cache(trained(case.levels))
    request = SimpleNamespace(num_inference_steps=STEPS, sigmas=case.levels)
    with pytest.raises(LesaError, match="full_steps=9: the run has 8 steps"):
        states(request, full_steps=9)
    with pytest.raises(LesaError, match="sglang.* run pip install"):
        Cache().maybe_reset()
