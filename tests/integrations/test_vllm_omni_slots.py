"""Requests in the slots of vLLM-Omni's step-wise batching: each is what it is alone.

`serve` and the classes below stand in for the engine's `DiTCacheManager`, `CacheBackendSlot` and
`DiTCacheStateDriverBase`, which are in its development branch only.
"""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch

import lesa
from lesa.integrations import vllm_omni_slots
from tests.integrations.captured import STEPS, captured

DRIVER = (
    "backend_name",
    "create_empty_slot",
    "install_slot",
    "initialize_fresh_slot",
    "is_slot_compatible",
    "deactivate_slot",
    "clear_slot",
    "estimate_slot_bytes",
)
Base = type("Base", (ABC,), {name: abstractmethod(lambda self: None) for name in DRIVER})


@dataclass
class CacheBackendSlot:
    backend_name: str
    payload: Any
    metadata: dict[str, Any] = field(default_factory=dict)
    resident_bytes: int = 0


class State:
    """The engine's state of a request, at work on the prompt alone."""

    def __init__(self, case, seed, steps):
        self.scheduler, self.cache_slot, self.step_index = copy.deepcopy(case.scheduler), None, 0
        self.scheduler.set_timesteps(steps, mu=0.5)
        noise = torch.Generator().manual_seed(seed)
        self.latents = torch.randn(case.latents.shape, generator=noise)
        self.steps = steps

    @property
    def time(self):
        return self.scheduler.timesteps[self.step_index]

    def advance(self, output):
        self.latents = self.scheduler.step(output, self.time, self.latents, return_dict=False)[0]
        self.step_index += 1


@pytest.fixture(scope="module")
def case():
    case = captured()
    case.scheduler = case.pipe.scheduler
    return case


@pytest.fixture
def driver(case, monkeypatch):
    contents = {
        "worker.utils": {"CacheBackendSlot": CacheBackendSlot},
        "cache.dit_cache_manager": {"DiTCacheStateDriverBase": Base},
    }
    for name in ("", ".diffusion", ".diffusion.worker", ".diffusion.cache"):
        monkeypatch.setitem(sys.modules, f"vllm_omni{name}", ModuleType(f"vllm_omni{name}"))
    for name, values in contents.items():
        module = ModuleType(f"vllm_omni.diffusion.{name}")
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    model = case.pipe.transformer
    lesa.apply_lesa_cache(model, lesa.LesaConfig(full_steps=3, scheduler=case.scheduler))
    yield vllm_omni_slots.state_driver(case.pipe)
    lesa.remove_lesa_cache(model)


@torch.no_grad()
def denoise(case, states):
    """One call of the transformer for one step of each request, whose rows lie in one batch."""
    rows = {name: value for name, value in case.conds[0].items() if value is not None}
    if len(states) > 1:
        words = {name: rows[name] for name in rows if not name.endswith("_ids")}
        rows |= {name: torch.cat([value] * len(states)) for name, value in words.items()}
    times = torch.stack([state.time for state in states]) / 1000
    latents = torch.cat([state.latents for state in states])
    output = case.pipe.transformer(
        hidden_states=latents, timestep=times, return_dict=False, **rows
    )[0]
    for state, part in zip(states, output.chunk(len(states)), strict=True):
        state.advance(part)


def begin(driver, state):
    driver.scheduler = state.scheduler
    state.cache_slot = slot = driver.create_empty_slot()
    driver.install_slot(slot)
    driver.initialize_fresh_slot(slot, state.steps)
    driver.deactivate_slot(slot)


def alone(case, driver, *args):
    state = State(case, *args)
    begin(driver, state)
    while state.step_index < state.steps:
        driver.install_slot(state.cache_slot)
        denoise(case, [state])
        driver.deactivate_slot(state.cache_slot)
    return state.latents


def test_interleaved_requests_are_what_they_are_alone(case, driver):
    wanted = [(1, STEPS), (2, 6), (3, STEPS)]
    expected = [alone(case, driver, *each) for each in wanted]
    states = [State(case, *each) for each in wanted]
    before = lesa.stats(case.pipe.transformer)
    for state in states:
        begin(driver, state)
    sizes = []
    for _ in range(STEPS):
        for state in states:
            if state.step_index < state.steps:
                driver.install_slot(state.cache_slot)
                denoise(case, [state])
                driver.deactivate_slot(state.cache_slot)
                sizes.append(driver.estimate_slot_bytes(state.cache_slot))
    for state, picture in zip(states, expected, strict=True):
        assert torch.equal(state.latents, picture)
        assert driver.estimate_slot_bytes(state.cache_slot) == 0  # after its last skipped step
    stats = lesa.stats(case.pipe.transformer)
    assert (stats.full - before.full, stats.fallbacks, max(sizes) > 0) == (3 * 3, {}, True)


def test_requests_at_other_steps_in_one_batch(case, driver):
    expected = [alone(case, driver, seed, STEPS) for seed in (1, 2)]
    first, late = (State(case, seed, STEPS) for seed in (1, 2))
    begin(driver, first)
    begin(driver, late)
    for turn in range(STEPS + 2):
        states = [state for state in (first, late) if state is first or turn >= 2]
        states = [state for state in states if state.step_index < STEPS]
        driver.install_batch_slots(states)
        denoise(case, states)
        driver.deactivate_batch_slots()
    for state, picture in zip((first, late), expected, strict=True):
        torch.testing.assert_close(state.latents, picture, rtol=0, atol=1e-5)  # batched sums


def test_a_slot_is_for_one_number_of_steps_and_is_given_back(case, driver):
    state = State(case, 1, STEPS)
    begin(driver, state)
    slot = state.cache_slot
    assert (slot.backend_name, isinstance(driver, Base)) == ("lesa", True)
    driver.install_slot(slot)
    for _ in range(2):
        denoise(case, [state])
    driver.deactivate_slot(slot)
    assert driver.is_slot_compatible(slot, STEPS)
    assert not driver.is_slot_compatible(slot, STEPS + 1)
    assert driver.estimate_slot_bytes(slot) > 0
    driver.clear_slot(slot)
    assert driver.estimate_slot_bytes(slot) == 0
    driver.deactivate_slot(None)
