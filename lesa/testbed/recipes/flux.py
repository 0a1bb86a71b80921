"""Train the embedded FLUX pipeline from nothing: ``python -m lesa.testbed.train flux``.

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

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import Tensor, nn

from lesa.testbed.build import IMAGE_SIZE, LATENT_CHANNELS, TOKENS, flux_pipeline
from lesa.testbed.recipes.common import Run, batches, draw, optimise
from lesa.testbed.scenes import FREE, NEAT, render_batch, scenes
from lesa.testbed.text import TEXT_LENGTH


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

    modules = nn.ModuleDict({"vae": vae})
    average = optimise(run, "vae", modules, loss_at, plan.vae_steps, plan.vae_lr, 0.99)
    vae.load_state_dict(average["vae"].state_dict())
    vae.requires_grad_(False).eval()


class Pool:
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

    @property
    def empty(self) -> int:
        """Row of the empty caption."""
        return len(self.latents)


def velocity(
    modules: nn.ModuleDict,
    latents: Tensor,
    sigma: Tensor,
    guidance: Tensor,
    clip: Tensor,
    t5: Tensor,
) -> Tensor:
    """The denoiser's output for token ids; ``sigma`` and ``guidance`` are ``[B]``."""
    side = int(TOKENS**0.5)
    ids = FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
    return modules["transformer"](
        hidden_states=latents,
        timestep=sigma,
        guidance=guidance,
        img_ids=ids,
        txt_ids=torch.zeros(TEXT_LENGTH, 3),
        encoder_hidden_states=modules["text_encoder_2"](t5)[0],
        pooled_projections=modules["text_encoder"](clip).pooler_output,
        return_dict=False,
    )[0]


def denoiser(pipe: FluxPipeline) -> nn.ModuleDict:
    return nn.ModuleDict(
        {name: getattr(pipe, name) for name in ("transformer", "text_encoder", "text_encoder_2")}
    )


def train_base(run: Run, pipe: FluxPipeline, free: Pool, neat: Pool) -> nn.ModuleDict:
    """Flow matching: the target is noise minus data; first on free scenes, then on neat ones.

    Guidance 1 means unguided; some captions are dropped.
    """
    plan, modules = run.plan, denoiser(pipe)

    def loss_at(step: int) -> Tensor:
        pool = free if step < plan.free_steps else neat
        batch = draw(run, "base", step, pool.latents)
        drop = (
            torch.rand(len(batch.rows), generator=run.generator("drop", step))
            < plan.caption_dropout
        )
        rows = torch.where(drop, pool.empty, batch.rows)
        output = velocity(
            modules,
            batch.noisy,
            batch.sigma,
            torch.ones(len(rows)),
            pool.clip[rows],
            pool.t5[rows],
        )
        return F.mse_loss(output, batch.noise - batch.clean)

    def snapshot(average: nn.ModuleDict) -> None:
        export(pipe, average, run.folder / "snapshot")

    return optimise(
        run, "base", modules, loss_at, plan.base_steps, plan.base_lr, plan.ema, snapshot
    )


def distil_guidance(
    run: Run, pipe: FluxPipeline, teacher: nn.ModuleDict, pool: Pool
) -> nn.ModuleDict:
    """Teach ``guidance = g`` the frozen teacher's ``v_empty + g (v_caption - v_empty)``."""
    plan = run.plan
    student = denoiser(pipe)
    student.load_state_dict(teacher.state_dict())
    for name in ("text_encoder", "text_encoder_2"):
        student[name].requires_grad_(False)
    teacher.eval()

    def loss_at(step: int) -> Tensor:
        batch = draw(run, "distill", step, pool.latents)
        count = len(batch.rows)
        scale = torch.rand(count, generator=run.generator("guidance", step)) * (
            plan.guidance[1] - plan.guidance[0]
        )
        scale = scale + plan.guidance[0]
        clip, t5 = pool.clip[batch.rows], pool.t5[batch.rows]
        one, empty = torch.ones(count), torch.full((count,), pool.empty)
        with torch.no_grad():
            caption = velocity(teacher, batch.noisy, batch.sigma, one, clip, t5)
            free = velocity(
                teacher, batch.noisy, batch.sigma, one, pool.clip[empty], pool.t5[empty]
            )
        target = free + scale[:, None, None] * (caption - free)
        return F.mse_loss(velocity(student, batch.noisy, batch.sigma, scale, clip, t5), target)

    return optimise(run, "distill", student, loss_at, plan.distill_steps, plan.distill_lr, 0.99)


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
    free = Pool(run, pipe, "free", run.plan.free_scenes, FREE)
    neat = Pool(run, pipe, "neat", run.plan.neat_scenes, NEAT)
    teacher = train_base(run, pipe, free, neat)
    export(pipe, distil_guidance(run, pipe, teacher, neat), run.folder / "export")
