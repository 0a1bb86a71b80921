"""Train the embedded FLUX pipeline from nothing: ``python -m lesa_testbed.train flux``.

Three stages, each seeded and resumable at its last checkpoint: the autoencoder on rendered scenes;
the denoiser (with its text encoders) by flow matching on encoded scenes; guidance distillation,
in which the guidance embedding learns to give in one call what classifier-free guidance of that
scale gives in two (as FLUX.1-dev was made). ``--export`` writes the pipeline folder with its log
and hashes. Under two hours on 2 CPU cores.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import Tensor, nn

from lesa_testbed.build import IMAGE_SIZE, LATENT_CHANNELS, TOKENS, flux_pipeline
from lesa_testbed.makers.common import (
    Pool,
    Run,
    batches,
    denoiser,
    distil_guidance,
    match_flow,
    train_autoencoder,
)
from lesa_testbed.scenes import FREE, NEAT, render_batch, scenes
from lesa_testbed.text import TEXT_LENGTH


@dataclass(frozen=True)
class Plan:
    """Every number of a training run; recorded beside the weights."""

    seed: int = 0
    free_scenes: int = 24_000
    neat_scenes: int = 16_000
    vae_scenes: int = 5_000
    vae_steps: int = 1_300
    vae_batch: int = 8
    vae_lr: float = 2e-3
    free_steps: int = 3_000
    base_steps: int = 8_500
    base_batch: int = 32
    base_lr: float = 1e-3
    caption_dropout: float = 0.1
    ema: float = 0.998
    distill_steps: int = 500
    distill_lr: float = 2e-4
    guidance: tuple[float, float] = (1.0, 6.0)
    train_shift: float = 2.0


def train_vae(run: Run, pipe: FluxPipeline) -> None:
    """Encoder and decoder on crowded scenes, in which colour and texture fill more of the area.

    The loss is the squared error, which the saturated minority of pixels dominates (L1 alone
    learns grey first), plus L1 on differences, which keeps edges sharp, and a light KL term.
    """
    plan, vae = run.plan, pipe.vae
    crowded = scenes(plan.vae_scenes, plan.seed, freedom=FREE, crowd=4)
    pool = torch.cat([render_batch(part) for part in batches(crowded, 500)])

    def loss_at(step: int) -> Tensor:
        generator = run.generator("vae", step)
        pictures = pool[torch.randint(0, len(pool), (plan.vae_batch,), generator=generator)]
        posterior = vae.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        output = vae.decode(posterior.mean + posterior.std * noise).sample
        edges = sum(F.l1_loss(output.diff(dim=d), pictures.diff(dim=d)) for d in (-1, -2))
        divergence = posterior.kl().mean() / pictures[0].numel()
        return 4 * F.mse_loss(output, pictures) + 0.5 * edges + 1e-4 * divergence

    train_autoencoder(run, vae, loss_at)


class FluxPool(Pool):
    """Encoded training scenes: normalised, packed latents and caption tokens.

    latents: ``[N, TOKENS, 4 * LATENT_CHANNELS]`` fp16. clip, t5: ``[N + 1, TEXT_LENGTH]``, the last
    row being the empty caption. The first pool of a run sets the autoencoder's shift and scale.
    """

    @torch.no_grad()
    def __init__(self, run: Run, pipe: FluxPipeline, name: str, count: int, freedom: float) -> None:
        pool = scenes(count, run.plan.seed, freedom=freedom)
        vae, side = pipe.vae, IMAGE_SIZE // 4
        if (state := run.load(name)) is None:
            parts = [vae.encode(render_batch(part)).latent_dist.mean for part in batches(pool, 64)]
            latents = torch.cat(parts)
            state = {"latents": latents.half(), "mean": latents.mean(), "std": latents.std()}
            run.save(name, state)
            run.log(stage=name, scenes=count, mean=state["mean"].item(), std=state["std"].item())
        if not vae.config.shift_factor:
            mean, std = state["mean"].item(), state["std"].item()
            vae.register_to_config(shift_factor=mean, scaling_factor=1 / std)
        normal = (state["latents"].float() - vae.config.shift_factor) * vae.config.scaling_factor
        self.latents = pipe._pack_latents(normal, count, LATENT_CHANNELS, side, side).half()
        captions = [*(scene.caption for scene in pool), ""]
        options = dict(
            padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        )
        self.clip = pipe.tokenizer(captions, **options).input_ids
        self.t5 = pipe.tokenizer_2(captions, **options).input_ids


def denoise(
    transformer: Any, latents: Tensor, sigma: Tensor, guidance: Any, pooled: Tensor, text: Tensor
) -> Tensor:
    """The transformer's output; ``sigma`` and ``guidance`` (or None) are ``[B]``."""
    side = int(TOKENS**0.5)
    ids = FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
    return transformer(
        hidden_states=latents,
        timestep=sigma,
        guidance=guidance,
        img_ids=ids,
        txt_ids=torch.zeros(TEXT_LENGTH, 3),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        return_dict=False,
    )[0]


def velocity(
    modules: Any, pool: FluxPool, latents: Tensor, sigma: Tensor, guidance: Tensor, rows: Tensor
) -> Tensor:
    """The denoiser's output for caption rows; ``sigma`` and ``guidance`` are ``[B]``."""
    text = modules["text_encoder_2"](pool.t5[rows])[0]
    pooled = modules["text_encoder"](pool.clip[rows]).pooler_output
    return denoise(modules["transformer"], latents, sigma, guidance, pooled, text)


def export(pipe: FluxPipeline, modules: nn.ModuleDict, folder: Path) -> None:
    """Write a ``from_pretrained`` folder, denoiser and autoencoder in half precision.

    diffusers loads those as float32 unless told otherwise; transformers would keep half, so the
    small text encoders are stored in float32.
    """
    halved = {"vae": pipe.vae, "transformer": modules["transformer"]}
    FluxPipeline(
        scheduler=pipe.scheduler,
        tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer_2,
        text_encoder=modules["text_encoder"],
        text_encoder_2=modules["text_encoder_2"],
        **{name: copy.deepcopy(module).half() for name, module in halved.items()},
    ).save_pretrained(folder)
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    # FLUX's own class name; under transformers 4, T5Tokenizer would need sentencepiece
    content["tokenizer_2"][1] = "T5TokenizerFast"
    index.write_text(json.dumps(content, indent=2) + "\n")


def train(run: Run) -> None:
    """All three stages; the finished pipeline lies in ``run.folder / "export"``."""
    pipe = flux_pipeline()
    train_vae(run, pipe)
    free = FluxPool(run, pipe, "free", run.plan.free_scenes, FREE)
    neat = FluxPool(run, pipe, "neat", run.plan.neat_scenes, NEAT)
    teacher = match_flow(
        run,
        denoiser(pipe),
        velocity,
        lambda step: free if step < run.plan.free_steps else neat,
        lambda average: export(pipe, average, run.folder / "snapshot"),
    )
    student = distil_guidance(run, denoiser(pipe), teacher, velocity, neat)
    export(pipe, student, run.folder / "export")
