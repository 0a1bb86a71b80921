"""The cache backend for vLLM-Omni, against stand-ins of its base classes.

vLLM-Omni is not installed here: the stand-ins have the names of its files cache/base.py,
cache/selector.py and data.py (0.30). docs/integrations/vllm_omni.md says what was run with them.
"""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import lesa
from lesa.errors import LesaError
from lesa.integrations import vllm_omni
from tests.integrations.captured import STEPS, captured, loop, trained, under_lesa

ROOT = Path(__file__).parents[2]


class CacheBackend(ABC):
    def __init__(self, config):
        self.config, self.enabled = config, False

    @abstractmethod
    def enable(self, pipeline): ...

    @abstractmethod
    def refresh(self, pipeline, num_inference_steps, verbose=True): ...

    def is_enabled(self):
        return self.enabled


class DiffusionCacheConfig:
    @classmethod
    def from_dict(cls, values):
        found = cls()
        found.__dict__ |= values
        return found


def get_cache_backend(cache_backend, cache_config):
    if cache_backend in (None, "none"):
        return None
    raise ValueError(f"Unsupported cache backend: {cache_backend}")


@pytest.fixture
def engine(monkeypatch):
    """The engine's modules, whose runner has imported the selector's function by name."""
    contents = {
        "": {},
        ".diffusion": {},
        ".diffusion.cache": {},
        ".diffusion.worker": {},
        ".diffusion.data": {"DiffusionCacheConfig": DiffusionCacheConfig},
        ".diffusion.cache.base": {"CacheBackend": CacheBackend},
        ".diffusion.cache.selector": {"get_cache_backend": get_cache_backend},
        ".diffusion.worker.diffusion_model_runner": {"get_cache_backend": get_cache_backend},
    }
    for name, values in contents.items():
        module = ModuleType(f"vllm_omni{name}")
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vllm_omni.register()
    vllm_omni.register()  # in every process, perhaps more than once
    return sys.modules["vllm_omni.diffusion.worker.diffusion_model_runner"].get_cache_backend


class Pipeline(nn.Module):
    """As the engine's: a module, whose loop names no call."""

    def __init__(self, case):
        super().__init__()
        self.transformer, self.scheduler = case.pipe.transformer, case.pipe.scheduler
        self.case = case

    def forward(self, scheduler=None):
        return loop(self.case, self.predict, scheduler or self.scheduler)

    def predict(self, step, latents, time, cond):
        times = time.expand(len(latents)) / 1000
        call = dict(hidden_states=latents, timestep=times, return_dict=False, **cond)
        return self.transformer(**call)[0]


@pytest.fixture(scope="module")
def case():
    case = captured()
    case.forecaster = trained(case.levels, latent=True)
    case.own = under_lesa(case, case.forecaster)
    return case


@pytest.fixture
def pipeline(case):
    yield Pipeline(case)
    lesa.remove_lesa_cache(case.pipe.transformer)


def made(engine, pipeline, **options):
    backend = engine("lesa", options)
    backend.enable(pipeline)
    return backend


def test_the_pictures_are_those_of_lesa(engine, case, pipeline, tmp_path):
    """Both predictions have their rows though no call is named; a second request is like the
    first, also after one that broke off."""
    case.forecaster.save_pretrained(tmp_path)
    backend = made(engine, pipeline, forecaster=str(tmp_path), full_steps=3)
    assert isinstance(backend, CacheBackend) and backend.is_enabled()
    found = []
    for _ in range(2):
        backend.refresh(pipeline, STEPS)
        found.append(pipeline())
        with pytest.raises(ZeroDivisionError):
            loop(
                case,
                lambda step, *given: pipeline.predict(step, *given) / (1 // (step < 5)),
                pipeline.scheduler,
            )
    torch.testing.assert_close(found[0], case.own, rtol=0, atol=1e-5)
    assert torch.equal(*found)
    stats = lesa.stats(pipeline.transformer)
    assert stats.fallbacks == {} and stats.skipped > 2 * 2 * 5
    assert not torch.allclose(found[0], case.plain, atol=1e-3)


def test_other_backends_stay_as_they_are(engine):
    assert engine("none", {}) is None
    with pytest.raises(ValueError, match="Unsupported cache backend: other"):
        engine("other", {})


def test_mistakes_are_one_sentence(engine, case, pipeline):
    backend = made(engine, pipeline, full_steps=9)
    with pytest.raises(LesaError, match="full_steps=9: the run has 8 steps"):
        backend.refresh(pipeline, STEPS)
    with pytest.raises(LesaError, match="has no transformer"):
        engine("lesa", {}).enable(nn.Linear(1, 1))
    with pytest.raises(LesaError, match="give a whole number"):
        engine("lesa", {"full_steps": 0}).enable(pipeline)


def test_the_entry_point_is_there():
    text = (ROOT / "pyproject.toml").read_text()
    group = re.escape('[project.entry-points."vllm_omni.general_plugins"]')
    name, value = re.search(rf'{group}.*\n(\w+) = "(.+)"', text).groups()
    assert EntryPoint(name, value, "vllm_omni.general_plugins").load() is vllm_omni.register


def test_an_engine_that_is_another_one_is_left_alone(caplog):
    """The entry point is called wherever lesa is installed: it stops nobody."""
    vllm_omni.register()
    assert "cache_backend='lesa' is not there" in caplog.text
