"""Train the embedded HunyuanVideo pipeline from nothing: ``python -m lesa_testbed.train hunyuan``.

Four stages: the causal autoencoder on single frames and on moving scenes of 9; word order for the
text encoder; the denoiser by flow matching; guidance distillation, since HunyuanVideo takes its
guidance scale as an input.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideoPipeline
from torch import Tensor

from lesa_testbed.build import VIDEO_TEXT_LENGTH, hunyuan_pipeline
from lesa_testbed.makers.common import (
    Pool,
    Run,
    batches,
    denoiser,
    distil_guidance,
    learn_order,
    match_flow,
    train_autoencoder,
)
from lesa_testbed.scenes import clips, render_clips

LAYER = -3  # the hidden states of the text encoder that HunyuanVideo reads


@dataclass(frozen=True)
class Plan:
    """Every number of a training run; recorded beside the weights."""

    seed: int = 0
    vae_clips: int = 800
    vae_steps: tuple[int, int] = (1_000, 2_000)  # on single frames, on clips
    vae_batch: tuple[int, int] = (8, 4)
    vae_lr: float = 2e-3
    clips: int = 8_000
    order_steps: int = 400
    base_steps: tuple[int, ...] = (2_000, 4_000, 4_000, 2_600, 5_000)
    base_batch: int = 16
    base_lr: float = 1e-3
    caption_dropout: float = 0.1
    ema: float = 0.998
    distill_steps: int = 400
    distill_lr: float = 2e-4
    guidance: tuple[float, float] = (1.0, 7.0)
    train_shift: float = 3.0


def train_vae(run: Run, pipe: HunyuanVideoPipeline) -> None:
    """Squared error, sharp edges and true motion, and a light KL term, on crowded clips: first on
    single frames, a ninth of the work, then on quarters of the picture, a fourth of it; the last
    fifth of the steps sees whole clips."""
    plan, vae = run.plan, pipe.vae
    drawn = [clip for crowd in (1, 4) for clip in clips(plan.vae_clips, plan.seed, crowd=crowd)]
    pool = torch.cat([render_clips(part).half() for part in batches(drawn, 100)])
    frames, side = pool.shape[2], pool.shape[-1]
    stills, moving = plan.vae_steps

    def loss_at(step: int) -> Tensor:
        generator = run.generator("vae", step)
        count, times, size = plan.vae_batch[1], frames, side // 2
        if step < stills:
            count, times, size = plan.vae_batch[0], 1, side
        elif step >= stills + 0.8 * moving:
            count, size = count // 2, side
        rows = torch.randint(0, len(pool), (count,), generator=generator)
        t = torch.randint(0, frames - times + 1, (1,), generator=generator).item()
        y, x = torch.randint(0, side - size + 1, (2,), generator=generator).tolist()
        videos = pool[rows, :, t : t + times, y : y + size, x : x + size].float()
        posterior = vae.encode(videos).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        output = vae.decode(posterior.mean + posterior.std * noise).sample
        wide = [d for d in (-1, -2, -3) if videos.shape[d] > 1]
        changes = sum(F.l1_loss(output.diff(dim=d), videos.diff(dim=d)) for d in wide)
        divergence = posterior.kl().mean() / videos[0].numel()
        return 4 * F.mse_loss(output, videos) + 0.5 * changes + 1e-4 * divergence

    train_autoencoder(run, vae, loss_at)


class VideoPool(Pool):
    """Encoded training clips ``[N, C, T, H, W]`` in fp16, scaled, and their caption tokens; the
    last row of the tokens is the empty caption."""

    @torch.no_grad()
    def __init__(self, run: Run, pipe: HunyuanVideoPipeline) -> None:
        drawn = clips(run.plan.clips, run.plan.seed)
        if (state := run.load("pool")) is None:
            encode = pipe.vae.encode
            with torch.autocast("cpu", torch.bfloat16):  # 2.5 times as fast
                parts = [encode(render_clips(part)).latent_dist.mean for part in batches(drawn, 4)]
            latents = torch.cat(parts).float()
            scale = 1 / latents.std()
            state = {"latents": (latents * scale).half(), "scale": scale}
            run.save("pool", state)
            run.log(stage="pool", clips=len(drawn), mean=latents.mean().item(), scale=scale.item())
        pipe.vae.register_to_config(scaling_factor=float(state["scale"]))
        self.latents = state["latents"]
        captions = [*(clip.caption for clip in drawn), ""]
        options = dict(padding="max_length", max_length=VIDEO_TEXT_LENGTH, return_tensors="pt")
        tokens = pipe.tokenizer(captions, **options)
        self.ids, self.mask = tokens.input_ids, tokens.attention_mask
        self.clip = pipe.tokenizer_2(captions, **options).input_ids


def velocity(
    modules: Any, pool: VideoPool, latents: Tensor, sigma: Tensor, guidance: Tensor, rows: Tensor
) -> Tensor:
    """The denoiser's output for caption rows; ``sigma`` and ``guidance`` are ``[B]``."""
    ids, mask = pool.ids[rows], pool.mask[rows]
    text = modules["text_encoder"](input_ids=ids, attention_mask=mask, output_hidden_states=True)
    return modules["transformer"](
        hidden_states=latents,
        timestep=1000 * sigma,
        encoder_hidden_states=text.hidden_states[LAYER],
        encoder_attention_mask=mask,
        pooled_projections=modules["text_encoder_2"](pool.clip[rows]).pooler_output,
        guidance=1000 * guidance,
        return_dict=False,
    )[0]


def export(pipe: HunyuanVideoPipeline, modules: Any, folder: Path) -> None:
    """Write a ``from_pretrained`` folder in half precision."""
    HunyuanVideoPipeline(
        text_encoder=copy.deepcopy(modules["text_encoder"]).half(),
        tokenizer=pipe.tokenizer,
        transformer=copy.deepcopy(modules["transformer"]).half(),
        vae=copy.deepcopy(pipe.vae).half(),
        scheduler=pipe.scheduler,
        text_encoder_2=copy.deepcopy(modules["text_encoder_2"]).half(),
        tokenizer_2=pipe.tokenizer_2,
    ).save_pretrained(folder)


def train(run: Run) -> None:
    """All stages; the finished pipeline lies in ``run.folder / "export"``."""
    pipe = hunyuan_pipeline()
    train_vae(run, pipe)
    pool = VideoPool(run, pipe)
    learn_order(run, "order", pipe.text_encoder, pool.ids, LAYER, run.plan.order_steps)
    teacher = match_flow(
        run,
        denoiser(pipe),
        velocity,
        lambda _: pool,
        lambda average: export(pipe, average, run.folder / "snapshot"),
    )
    student = distil_guidance(run, denoiser(pipe), teacher, velocity, pool)
    export(pipe, student, run.folder / "export")
