"""Train the embedded FLUX pipeline from nothing: ``python -m lesa.testbed.train``.

Three stages, each seeded and resumable at its last checkpoint: the autoencoder on rendered scenes;
the denoiser (with its text encoders) by flow matching on encoded scenes; guidance distillation,
in which the guidance embedding learns to give in one call what classifier-free guidance of that
scale gives in two (as FLUX.1-dev was made). ``--export`` writes the pipeline folder with its log
and hashes. About an hour on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import Tensor, nn

from lesa.testbed.build import IMAGE_SIZE, LATENT_CHANNELS, TOKENS, flux_pipeline
from lesa.testbed.scenes import render_batch, scenes
from lesa.testbed.text import TEXT_LENGTH


@dataclass(frozen=True)
class Plan:
    """Every number of a training run; recorded beside the weights."""

    seed: int = 0
    scenes: int = 24_000
    vae_scenes: int = 5_000
    vae_steps: int = 1_300
    vae_batch: int = 8
    vae_lr: float = 2e-3
    base_steps: int = 3_400
    base_batch: int = 32
    base_lr: float = 1e-3
    caption_dropout: float = 0.1
    ema: float = 0.998
    distill_steps: int = 350
    distill_lr: float = 2e-4
    guidance: tuple[float, float] = (1.0, 6.0)
    train_shift: float = 2.0


class Run:
    """Folder of one training run: checkpoints, log lines, and the stream of per-step
    generators."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        folder.mkdir(parents=True, exist_ok=True)
        self.started = time.time()

    def generator(self, stage: str, step: int) -> torch.Generator:
        """A generator that depends on (seed, stage, step) alone, so a resumed run draws what an
        unbroken one would."""
        digest = hashlib.sha256(f"{self.plan.seed}/{stage}/{step}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def log(self, **fields: object) -> None:
        line = {"seconds": round(time.time() - self.started, 1), **fields}
        print(json.dumps(line), flush=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def save(self, stage: str, state: dict[str, object]) -> None:
        partial = self.folder / f"{stage}.partial"
        torch.save(state, partial)
        partial.replace(self.folder / f"{stage}.pt")

    def load(self, stage: str) -> dict | None:
        path = self.folder / f"{stage}.pt"
        return torch.load(path, weights_only=True) if path.exists() else None


def decayed(step: int, steps: int, warmup: int = 150, tail: float = 0.25) -> float:
    """Warm up, hold, then fall linearly to 2 % over the last ``tail`` of the steps."""
    return min(1.0, (step + 1) / warmup, max(0.02, (steps - step) / (tail * steps)))


def optimise(
    run: Run,
    stage: str,
    modules: nn.ModuleDict,
    loss_at: Callable[[int], Tensor],
    steps: int,
    lr: float,
    ema: float,
    on_save: Callable[[nn.ModuleDict], None] | None = None,
) -> nn.ModuleDict:
    """AdamW over ``steps`` with a decaying rate, clipping and an exponential moving average,
    which is returned."""
    average = copy.deepcopy(modules).requires_grad_(False)
    optimiser = torch.optim.AdamW(modules.parameters(), lr=lr, betas=(0.9, 0.97), weight_decay=0.01)
    start = 0
    if (state := run.load(stage)) is not None:
        modules.load_state_dict(state["modules"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        start = state["step"]
    mean = None
    for step in range(start, steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * decayed(step, steps)
        loss = loss_at(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            rate = min(ema, (step + 1) / (step + 10))
            for slow, fast in zip(average.parameters(), modules.parameters(), strict=True):
                slow.lerp_(fast, 1 - rate)
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            run.log(stage=stage, step=step + 1, of=steps, loss=round(mean, 5))
        if (step + 1) % 250 == 0 or step + 1 == steps:
            run.save(
                stage,
                {
                    "modules": modules.state_dict(),
                    "average": average.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "step": step + 1,
                },
            )
            if on_save is not None:
                on_save(average)
    return average


def train_vae(run: Run, pipe: FluxPipeline) -> None:
    """Encoder and decoder on crowded scenes, in which colour and texture fill more of the area.

    The loss is the squared error, which the saturated minority of pixels dominates (L1 alone
    learns grey first), plus L1 on differences, which keeps edges sharp, and a light KL term.
    """
    plan, vae = run.plan, pipe.vae
    crowded = scenes(plan.vae_scenes, plan.seed, crowd=4)
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


def batches(items: list, size: int) -> Iterator[list]:
    return (items[start : start + size] for start in range(0, len(items), size))


@torch.no_grad()
def encode(run: Run, pipe: FluxPipeline) -> tuple[Tensor, list[str]]:
    """Normalised, packed latents ``[N, TOKENS, 4 * LATENT_CHANNELS]`` (fp16) and captions of the
    training scenes."""
    pool = scenes(run.plan.scenes, run.plan.seed)
    if (state := run.load("latents")) is None:
        latents = torch.cat(
            [pipe.vae.encode(render_batch(part)).latent_dist.mean for part in batches(pool, 64)]
        )
        state = {"latents": latents.half(), "mean": latents.mean(), "std": latents.std()}
        run.save("latents", state)
        run.log(
            stage="encode", scenes=len(pool), mean=state["mean"].item(), std=state["std"].item()
        )
    pipe.vae.register_to_config(
        shift_factor=state["mean"].item(), scaling_factor=1 / state["std"].item()
    )
    normal = (state["latents"].float() - state["mean"]) / state["std"]
    side = IMAGE_SIZE // 4
    packed = pipe._pack_latents(normal, len(pool), LATENT_CHANNELS, side, side)
    return packed.half(), [scene.caption for scene in pool]


class Tokens:
    """Captions tokenised once for both encoders; the last row is the empty caption."""

    def __init__(self, pipe: FluxPipeline, captions: list[str]) -> None:
        options = dict(
            padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        )
        self.clip = pipe.tokenizer([*captions, ""], **options).input_ids
        self.t5 = pipe.tokenizer_2([*captions, ""], **options).input_ids


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


@dataclass
class Draw:
    """One training batch: clean latents, noise, noise level and token rows."""

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    rows: Tensor

    @property
    def noisy(self) -> Tensor:
        sigma = self.sigma[:, None, None]
        return (1 - sigma) * self.clean + sigma * self.noise


def draw(run: Run, stage: str, step: int, latents: Tensor) -> Draw:
    """Logit-normal noise levels, shifted as at inference."""
    generator, plan = run.generator(stage, step), run.plan
    rows = torch.randint(0, len(latents), (plan.base_batch,), generator=generator)
    clean = latents[rows].float()
    u = torch.sigmoid(torch.randn(plan.base_batch, generator=generator))
    sigma = plan.train_shift * u / (1 + (plan.train_shift - 1) * u)
    return Draw(clean, torch.randn(clean.shape, generator=generator), sigma, rows)


def denoiser(pipe: FluxPipeline) -> nn.ModuleDict:
    return nn.ModuleDict(
        {name: getattr(pipe, name) for name in ("transformer", "text_encoder", "text_encoder_2")}
    )


def train_base(run: Run, pipe: FluxPipeline, latents: Tensor, tokens: Tokens) -> nn.ModuleDict:
    """Flow matching: the target is noise minus data.

    Guidance 1 means unguided; some captions are dropped.
    """
    plan, modules = run.plan, denoiser(pipe)

    def loss_at(step: int) -> Tensor:
        batch = draw(run, "base", step, latents)
        drop = (
            torch.rand(len(batch.rows), generator=run.generator("drop", step))
            < plan.caption_dropout
        )
        rows = torch.where(drop, len(latents), batch.rows)
        output = velocity(
            modules,
            batch.noisy,
            batch.sigma,
            torch.ones(len(rows)),
            tokens.clip[rows],
            tokens.t5[rows],
        )
        return F.mse_loss(output, batch.noise - batch.clean)

    def snapshot(average: nn.ModuleDict) -> None:
        export(pipe, average, run.folder / "snapshot")

    return optimise(
        run, "base", modules, loss_at, plan.base_steps, plan.base_lr, plan.ema, snapshot
    )


def distil_guidance(
    run: Run, pipe: FluxPipeline, teacher: nn.ModuleDict, latents: Tensor, tokens: Tokens
) -> nn.ModuleDict:
    """Teach ``guidance = g`` the frozen teacher's ``v_empty + g (v_caption - v_empty)``."""
    plan = run.plan
    student = denoiser(pipe)
    student.load_state_dict(teacher.state_dict())
    for name in ("text_encoder", "text_encoder_2"):
        student[name].requires_grad_(False)
    teacher.eval()

    def loss_at(step: int) -> Tensor:
        batch = draw(run, "distill", step, latents)
        count = len(batch.rows)
        scale = torch.rand(count, generator=run.generator("guidance", step)) * (
            plan.guidance[1] - plan.guidance[0]
        )
        scale = scale + plan.guidance[0]
        clip, t5 = tokens.clip[batch.rows], tokens.t5[batch.rows]
        one, empty = torch.ones(count), torch.full((count,), len(latents))
        with torch.no_grad():
            caption = velocity(teacher, batch.noisy, batch.sigma, one, clip, t5)
            free = velocity(
                teacher, batch.noisy, batch.sigma, one, tokens.clip[empty], tokens.t5[empty]
            )
        target = free + scale[:, None, None] * (caption - free)
        return F.mse_loss(velocity(student, batch.noisy, batch.sigma, scale, clip, t5), target)

    return optimise(run, "distill", student, loss_at, plan.distill_steps, plan.distill_lr, 0.99)


def export(pipe: FluxPipeline, modules: nn.ModuleDict, folder: Path) -> None:
    """Write a ``from_pretrained`` folder with half-precision weights; ``tokenizer_2`` keeps
    FLUX's class name."""
    parts = {name: copy.deepcopy(modules[name]).half() for name in modules}
    FluxPipeline(
        scheduler=pipe.scheduler,
        tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer_2,
        vae=copy.deepcopy(pipe.vae).half(),
        **parts,
    ).save_pretrained(folder)
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    content["tokenizer_2"][1] = (
        "T5TokenizerFast"  # transformers 4 needs sentencepiece for T5Tokenizer
    )
    index.write_text(json.dumps(content, indent=2) + "\n")


def record(run: Run, folder: Path) -> None:
    """Copy the log and write plan and sha256 of every weight file beside the exported
    pipeline."""
    hashes = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }
    (folder / "training.json").write_text(
        json.dumps({"plan": asdict(run.plan), "sha256": hashes}, indent=2) + "\n"
    )
    (folder / "training-log.jsonl").write_text((run.folder / "log.jsonl").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, default=Path("runs/flux"), help="folder of checkpoints and the log"
    )
    parser.add_argument("--export", type=Path, help="write the finished pipeline here")
    parser.add_argument("--base-steps", type=int, default=Plan.base_steps)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = Run(options.run, Plan(base_steps=options.base_steps))
    torch.manual_seed(run.plan.seed)
    pipe = flux_pipeline()
    train_vae(run, pipe)
    latents, captions = encode(run, pipe)
    tokens = Tokens(pipe, captions)
    teacher = train_base(run, pipe, latents, tokens)
    student = distil_guidance(run, pipe, teacher, latents, tokens)
    if options.export is not None:
        export(pipe, student, options.export)
        record(run, options.export)


if __name__ == "__main__":
    main()
