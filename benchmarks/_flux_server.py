"""The loop of a small server around FLUX: a step of one request, then a step of another."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from torch import Tensor

from lesa import testbed

SIZES = (32, 48, 64)
STEPS = (20, 28, 50)
SHARES: tuple[float | None, ...] = (None, 0.4, 0.25, 0.16)  # of the steps; None: the pipeline's own


@dataclass(frozen=True)
class Kind:
    """What a request asks for; `budget` full steps, or None for the pipeline's own."""

    prompt: str
    size: int
    steps: int
    budget: int | None
    guidance: float
    true_cfg: float
    seed: int


def draw_kinds(count: int, seed: int) -> list[Kind]:
    """Kinds of requests, no two alike; every third has two guidance branches."""
    random, prompts = Random(seed), testbed.captions(count)
    found = []
    for number, prompt in enumerate(prompts):
        steps, share = random.choice(STEPS), random.choice(SHARES)
        found.append(
            Kind(
                prompt,
                random.choice(SIZES),
                steps,
                None if share is None else max(2, round(share * steps)),
                random.choice((2.0, 3.5, 5.0)),
                3.0 if number % 3 == 2 else 1.0,
                number,
            )
        )
    return found


class Flux:
    """The parts of a FluxPipeline that a server calls by itself, with prompts encoded ahead."""

    def __init__(self, pipe: Any, kinds: list[Kind]) -> None:
        self.pipe = pipe
        texts = {kind.prompt for kind in kinds} | {""}
        self._prompts = {
            text: pipe.encode_prompt(text, None, max_sequence_length=20) for text in texts
        }

    async def generate(
        self,
        kind: Kind,
        begin: Callable[[Any], AbstractContextManager[Any]],
        name: str = "",
        abort_at: int | None = None,
    ) -> Tensor:
        """The picture of a request, in [0, 1]; other requests make their steps between its own.

        Args:
            kind: what it asks for.
            begin: makes, of its scheduler, what every step is inside of.
            name: in front of the names of its guidance branches.
            abort_at: the step before which it is cancelled.
        """
        pipe, scheduler = self.pipe, copy.deepcopy(self.pipe.scheduler)
        latent, ids = pipe.prepare_latents(
            1, pipe.transformer.config.in_channels // 4, kind.size, kind.size,
            torch.float32, "cpu", torch.Generator().manual_seed(kind.seed),
        )  # fmt: skip
        times = _times(scheduler, kind.steps, latent.shape[1])
        branches = [("cond", self._prompts[kind.prompt])]
        if kind.true_cfg > 1:
            branches.append(("uncond", self._prompts[""]))
        guidance = torch.full([1], kind.guidance)
        inside = begin(scheduler)
        for index, time in enumerate(times):
            if index == abort_at:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            await asyncio.sleep(0)
            with inside:
                noises = [
                    self._noise(name + branch, prompt, latent, ids, time, guidance)
                    for branch, prompt in branches
                ]
            noise = noises[0]
            if len(noises) == 2:
                noise = noises[1] + kind.true_cfg * (noises[0] - noises[1])
            latent = scheduler.step(noise, time, latent, return_dict=False)[0]
        return self._decode(latent, kind.size)

    def _noise(
        self, branch: str, prompt: Any, latent: Tensor, ids: Tensor, time: Tensor, guidance: Tensor
    ) -> Tensor:
        """The denoiser's output, as FluxPipeline calls it."""
        embeds, pooled, text_ids = prompt
        with self.pipe.transformer.cache_context(branch):
            output: Tensor = self.pipe.transformer(
                hidden_states=latent,
                timestep=time.expand(1) / 1000,
                guidance=guidance,
                pooled_projections=pooled,
                encoder_hidden_states=embeds,
                txt_ids=text_ids,
                img_ids=ids,
                joint_attention_kwargs={},
                return_dict=False,
            )[0]
        return output

    def _decode(self, latent: Tensor, size: int) -> Tensor:
        pipe = self.pipe
        latent = pipe._unpack_latents(latent, size, size, pipe.vae_scale_factor)
        config = pipe.vae.config
        latent = latent / config.scaling_factor + config.shift_factor
        image = pipe.vae.decode(latent, return_dict=False)[0]
        shown: Tensor = pipe.image_processor.postprocess(image, output_type="pt")
        return shown

    def by_the_pipeline(self, kind: Kind) -> Tensor:
        """The same picture by the pipeline's own call, with nothing else in flight."""
        negative = {"negative_prompt": "", "true_cfg_scale": kind.true_cfg}
        image: Tensor = self.pipe(
            kind.prompt,
            height=kind.size,
            width=kind.size,
            num_inference_steps=kind.steps,
            guidance_scale=kind.guidance,
            max_sequence_length=20,
            generator=torch.Generator().manual_seed(kind.seed),
            output_type="pt",
            **(negative if kind.true_cfg > 1 else {}),
        ).images
        return image


def plainly(_scheduler: Any) -> AbstractContextManager[None]:
    """What a step is inside of where nothing is kept of a request."""
    return nullcontext()


def _times(scheduler: Any, steps: int, length: int) -> Tensor:
    """The times of a run, set as FluxPipeline does."""
    config = scheduler.config
    shift = calculate_shift(
        length,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    sigmas = np.linspace(1.0, 1 / steps, steps)
    times, _ = retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=shift)
    scheduler.set_begin_index(0)
    found: Tensor = times
    return found
