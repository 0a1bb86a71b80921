"""Train the embedded Qwen-Image pipeline from nothing: ``python -m lesa_testbed.train qwen``.

Two stages: an autoencoder of Qwen-Image's class (causal 3-D convolutions) that learns the latent
space of the embedded FLUX autoencoder; the denoiser with its text encoder by flow matching, some
captions replaced by the negative prompt, so that true classifier-free guidance works.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline
from torch import Tensor, nn

import lesa.testbed
from lesa_testbed.build import IMAGE_SIZE, TOKENS, qwen_pipeline
from lesa_testbed.makers.common import (
    Pool,
    Run,
    batches,
    flux_latents,
    latent_pool,
    match_flow,
    train_autoencoder,
)
from lesa_testbed.scenes import FREE, NEAT, render_batch, scenes

NEGATIVE = " "  # Qwen-Image's own empty prompt


@dataclass(frozen=True)
class Plan:
    """Every number of a training run; recorded beside the weights."""

    seed: int = 0
    vae_scenes: int = 3_000
    vae_steps: int = 800
    vae_batch: int = 8
    vae_lr: float = 2e-3
    scenes: int = 20_000
    base_steps: tuple[int, ...] = (6_000, 3_500)
    base_batch: int = 32
    base_lr: float = 1e-3
    caption_dropout: float = 0.15
    ema: float = 0.998
    train_shift: float = 2.0


def train_vae(run: Run, pipe: QwenImagePipeline) -> None:
    """Encoder and decoder, each on its own, against FLUX's normalised latents of crowded scenes.

    The losses of train_vae in flux.py, without clamping the decoder's output; the variance is held
    at exp(-6).
    """
    plan, vae, flux = run.plan, pipe.vae, lesa.testbed.load("flux").vae
    crowded = scenes(plan.vae_scenes, plan.seed, freedom=FREE, crowd=4)
    pool = torch.cat([render_batch(part) for part in batches(crowded, 500)])

    def loss_at(step: int) -> Tensor:
        generator = run.generator("vae", step)
        pictures = pool[torch.randint(0, len(pool), (plan.vae_batch,), generator=generator)]
        with torch.no_grad():
            latents = flux_latents(flux, pictures)[:, :, None]
        pictures = pictures[:, :, None]
        posterior = vae.encode(pictures).latent_dist
        noisy = latents + 0.05 * torch.randn(latents.shape, generator=generator)
        output = vae.decoder(vae.post_quant_conv(noisy))
        edges = sum(F.l1_loss(output.diff(dim=d), pictures.diff(dim=d)) for d in (-1, -2))
        variance = (posterior.logvar + 6).square().mean()
        matched = F.mse_loss(posterior.mean, latents) + 1e-2 * variance
        return 4 * F.mse_loss(output, pictures) + 0.5 * edges + matched

    train_autoencoder(run, vae, loss_at)


def tokenize(pipe: QwenImagePipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask ``[N, L]`` of captions in the pipeline's prompt template."""
    prompts = [pipe.prompt_template_encode.format(caption) for caption in captions]
    tokens = pipe.tokenizer(prompts, padding=True, padding_side="right", return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def denoise(transformer: Any, latents: Tensor, sigma: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """The transformer's output; ``sigma`` is ``[B]``."""
    side = int(TOKENS**0.5)
    return transformer(
        hidden_states=latents,
        timestep=sigma,
        encoder_hidden_states=text,
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, side, side)]] * len(latents),
        return_dict=False,
    )[0]


class QwenPool(Pool):
    """Packed latents ``[N, TOKENS, 4 C]`` of neat scenes and their caption tokens; the last row of
    the tokens is the negative prompt. The first ``start`` tokens are the template's."""

    def __init__(self, run: Run, pipe: QwenImagePipeline) -> None:
        flux, side = lesa.testbed.load("flux").vae, IMAGE_SIZE // 4
        drawn = scenes(run.plan.scenes, run.plan.seed, freedom=NEAT)
        encoded = latent_pool(run, drawn, lambda pictures: flux_latents(flux, pictures))
        self.latents = pipe._pack_latents(encoded, len(drawn), encoded.shape[1], side, side)
        self.ids, self.mask = tokenize(pipe, [*(scene.caption for scene in drawn), NEGATIVE])
        self.start = pipe.prompt_template_encode_start_idx


def velocity(
    modules: Any, pool: QwenPool, latents: Tensor, sigma: Tensor, guidance: Tensor, rows: Tensor
) -> Tensor:
    """The denoiser's output for caption rows; Qwen-Image takes no ``guidance``."""
    mask = pool.mask[rows]
    used = int(mask.sum(1).max())
    ids, mask = pool.ids[rows, :used], mask[:, :used]
    text = modules["text_encoder"].model(input_ids=ids, attention_mask=mask).last_hidden_state
    kept = slice(pool.start, None)
    return denoise(modules["transformer"], latents, sigma, text[:, kept], mask[:, kept])


def export(pipe: QwenImagePipeline, modules: nn.ModuleDict, folder: Path) -> None:
    """Write a ``from_pretrained`` folder, denoiser and autoencoder in half precision."""
    QwenImagePipeline(
        scheduler=pipe.scheduler,
        vae=copy.deepcopy(pipe.vae).half(),
        text_encoder=modules["text_encoder"],
        tokenizer=pipe.tokenizer,
        transformer=copy.deepcopy(modules["transformer"]).half(),
    ).save_pretrained(folder)


def train(run: Run) -> None:
    """Both stages; the finished pipeline lies in ``run.folder / "export"``."""
    pipe = qwen_pipeline()
    train_vae(run, pipe)
    pool = QwenPool(run, pipe)
    modules = nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder})
    average = match_flow(
        run,
        modules,
        velocity,
        lambda _: pool,
        lambda average: export(pipe, average, run.folder / "snapshot"),
    )
    export(pipe, average, run.folder / "export")
