"""Train the embedded SDXL pipeline from nothing: ``python -m lesa_testbed.train sdxl``.

The latents are those of the embedded FLUX autoencoder, which is of SDXL's class. Two stages: the
two text encoders learn word order; the U-Net, with them, learns to predict the noise on SDXL's own
noise schedule. Some captions become zeros, which is what SDXL's empty negative prompt is.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

import lesa.testbed
from lesa_testbed.build import IMAGE_SIZE, sdxl_pipeline
from lesa_testbed.makers.common import Run, flux_latents, latent_pool, learn_order, optimise
from lesa_testbed.scenes import NEAT, scenes

SIZES = (IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE)  # original, crop corner, target


@dataclass(frozen=True)
class Plan:
    """Every number of a training run; recorded beside the weights."""

    seed: int = 0
    scenes: int = 20_000
    order_steps: int = 500
    base_steps: tuple[int, ...] = (4_000, 8_000)
    base_batch: int = 32
    base_lr: float = 8e-4
    caption_dropout: float = 0.12
    ema: float = 0.998


def noise(
    modules: Any, latents: Tensor, timesteps: Tensor, ids: Tensor, drop: Tensor | None = None
) -> Tensor:
    """The U-Net's noise prediction for token ids; rows in ``drop`` ``[B]`` get no caption."""
    first = modules["text_encoder"](ids, output_hidden_states=True)
    second = modules["text_encoder_2"](ids, output_hidden_states=True)
    text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
    pooled = second.text_embeds
    if drop is not None:
        text, pooled = text * ~drop[:, None, None], pooled * ~drop[:, None]
    added = dict(text_embeds=pooled, time_ids=torch.tensor([SIZES]).repeat(len(ids), 1))
    return modules["unet"](
        latents, timesteps, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False
    )[0]


def train_base(run: Run, pipe: StableDiffusionXLPipeline, latents: Tensor, ids: Tensor) -> Any:
    """Squared error of the noise, all noise levels alike."""
    plan, kept = run.plan, pipe.scheduler.alphas_cumprod
    names = ("unet", "text_encoder", "text_encoder_2")
    modules = nn.ModuleDict({name: getattr(pipe, name) for name in names})

    def loss_at(step: int) -> Tensor:
        generator = run.generator("base", step)
        rows = torch.randint(0, len(latents), (plan.base_batch,), generator=generator)
        timesteps = torch.randint(0, len(kept), rows.shape, generator=generator)
        clean, drawn = (
            latents[rows].float(),
            torch.randn(len(rows), *latents.shape[1:], generator=generator),
        )
        drop = torch.rand(len(rows), generator=generator) < plan.caption_dropout
        share = kept[timesteps].view(-1, 1, 1, 1)
        noisy = share.sqrt() * clean + (1 - share).sqrt() * drawn
        return F.mse_loss(noise(modules, noisy, timesteps, ids[rows], drop), drawn)

    def snapshot(average: nn.ModuleDict) -> None:
        export(pipe, average, run.folder / "snapshot")

    return optimise(
        run, "base", modules, loss_at, plan.base_steps, plan.base_lr, plan.ema, snapshot
    )


def export(pipe: StableDiffusionXLPipeline, modules: Any, folder: Path) -> None:
    """Write a ``from_pretrained`` folder without the autoencoder, which is FLUX's."""
    StableDiffusionXLPipeline(
        vae=pipe.vae,
        text_encoder=modules["text_encoder"],
        text_encoder_2=modules["text_encoder_2"],
        tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer_2,
        unet=copy.deepcopy(modules["unet"]).half(),
        scheduler=pipe.scheduler,
        add_watermarker=False,
    ).save_pretrained(folder)
    shutil.rmtree(folder / "vae")


def train(run: Run) -> None:
    """Both stages; the finished pipeline lies in ``run.folder / "export"``."""
    vae = lesa.testbed.load("flux").vae
    pool = scenes(run.plan.scenes, run.plan.seed, freedom=NEAT)
    vae.register_to_config(shift_factor=0.0)  # SDXL's pipeline knows none
    latents = latent_pool(run, pool, lambda pictures: flux_latents(vae, pictures))
    pipe = sdxl_pipeline(vae)
    options = dict(padding="max_length", truncation=True, return_tensors="pt")
    ids = pipe.tokenizer([scene.caption for scene in pool], **options).input_ids
    for name in ("text_encoder", "text_encoder_2"):
        learn_order(run, name, getattr(pipe, name), ids, -2, run.plan.order_steps)
    export(pipe, train_base(run, pipe, latents, ids), run.folder / "export")
