"""A stand-in for ComfyUI, which is no package: the part of its public contract that lesa uses.

It is not ComfyUI, and a test that passes here says nothing of another version of it; what was run
in ComfyUI itself is in docs/integrations/comfyui.md. Written after the names of its files
comfy/patcher_extension.py, comfy/samplers.py and comfy_api/latest.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from types import ModuleType, SimpleNamespace
from uuid import uuid4

import torch


class Executor:
    """Runs wrappers from the outside in, then the function."""

    def __init__(self, function, class_obj, wrappers):
        self.function, self.class_obj, self.wrappers = function, class_obj, wrappers

    def __call__(self, *args, **kwargs):
        if not self.wrappers:
            return self.function(*args, **kwargs)
        first, *others = self.wrappers
        return first(Executor(self.function, self.class_obj, others), *args, **kwargs)


def wrappers_of(options, kind):
    found = options.get("transformer_options", options).get("wrappers", {}).get(kind, {})
    return [wrapper for listed in found.values() for wrapper in listed]


class CONST:
    """The model sampling of flow models, by its name."""


class RatioSampling:
    """One whose sigma is the ratio of noise to signal."""


class ModelPatcher:
    """Wraps a diffusion model; patches are on clones."""

    def __init__(self, diffusion_model, model_sampling, wrappers=None):
        self.parts = {"diffusion_model": diffusion_model, "model_sampling": model_sampling}
        self.wrappers = wrappers or {}

    def clone(self):
        copied = {kind: {k: [*v] for k, v in of.items()} for kind, of in self.wrappers.items()}
        return ModelPatcher(*self.parts.values(), copied)

    def get_model_object(self, name):
        return self.parts[name]

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)


class Guider:
    """Guidance over named arguments of the model: in one batch, or the prompt alone first."""

    def __init__(self, patcher, conds, cfg, together=True):
        self.model_patcher, self.cfg, self.together = patcher, cfg, together
        self.conds = [(uuid4(), kind, cond) for kind, cond in enumerate(conds)]
        self.model_options = {"transformer_options": {"wrappers": patcher.wrappers}}

    def sample(self, noise, sigmas, sampler):
        wrappers = wrappers_of(self.model_options, "outer_sample")
        return Executor(self.outer_sample, self, wrappers)(noise, None, sampler, sigmas)

    def outer_sample(self, noise, latent_image, sampler, sigmas):
        return sampler.sampler_function(self.denoised, noise, sigmas)

    def denoised(self, x, sigma):
        """The guided prediction of the clean latents."""
        groups = [self.conds] if self.together else [[cond] for cond in self.conds]
        outputs = [part for group in groups for part in self.apply(x, sigma, group)]
        clean = [x - output * sigma for output in outputs]
        return clean[-1] + self.cfg * (clean[0] - clean[-1]) if len(clean) > 1 else clean[0]

    def apply(self, x, sigma, group):
        uuids, kinds, conds = zip(*group, strict=True)
        own = self.model_options["transformer_options"]
        options = own | {"uuids": [*uuids], "cond_or_uncond": [*kinds], "sigmas": sigma.reshape(1)}
        model = self.model_patcher.get_model_object("diffusion_model")
        names = conds[0].keys()
        args = {name: torch.cat([cond[name] for cond in conds]) for name in names}
        call = Executor(model, model, wrappers_of(options, "diffusion_model"))
        batch, times = x.repeat(len(group), *[1] * (x.ndim - 1)), sigma.repeat(len(group) * len(x))
        return call(batch, times, transformer_options=options, **args).chunk(len(group))


def sample_euler(denoised, x, sigmas):
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        x = x + (x - denoised(x, sigma)) / sigma * (following - sigma)
    return x


def sample_heun(denoised, x, sigmas):
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        slope = (x - denoised(x, sigma)) / sigma
        end = x + slope * (following - sigma)
        if following > 0:
            slope = (slope + (end - denoised(end, following)) / following) / 2
        x = x + slope * (following - sigma)
    return x


EULER, HEUN = (SimpleNamespace(sampler_function=each) for each in (sample_euler, sample_heun))


class ComfyNode:
    """Base of nodes."""


class ComfyExtension(ABC):
    @abstractmethod
    async def get_node_list(self): ...


class _Kind:
    """Inputs and outputs, which keep what they were made from."""

    @classmethod
    def Input(cls, id, **fields):
        return SimpleNamespace(id=id, **fields)

    @classmethod
    def Output(cls, **fields):
        return SimpleNamespace(**fields)


def install(monkeypatch, models_dir):
    """Let `comfy_api.latest` and `folder_paths` be imported."""
    api, latest, paths = (ModuleType(n) for n in ("comfy_api", "comfy_api.latest", "folder_paths"))
    kinds = dict.fromkeys(("Model", "Int", "Float", "Combo"), _Kind)
    latest.ComfyExtension = ComfyExtension
    latest.io = SimpleNamespace(
        ComfyNode=ComfyNode,
        Custom=lambda name: _Kind,
        Schema=lambda **fields: SimpleNamespace(**fields),
        NodeOutput=lambda *values: values,
        **kinds,
    )
    paths.models_dir = str(models_dir)
    for module in (api, latest, paths):
        monkeypatch.setitem(sys.modules, module.__name__, module)
