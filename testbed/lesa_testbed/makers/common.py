"""What the makers share: a resumable run, the optimiser's loop, captions as tokens, records."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lesa_testbed.scenes import Scene, render_batch


class Run:
    """Folder of one training run: checkpoints, log lines, and the stream of per-step generators.

    `plan` is the maker's dataclass of numbers; it has a field `seed`.
    """

    def __init__(self, folder: Path, plan: Any) -> None:
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


def decayed(step: int, rounds: Sequence[int], warmup: int = 150, tail: float = 0.25) -> float:
    """In each round of so many steps: warm up, hold, then fall linearly to 2 % over the last
    ``tail`` of them."""
    for steps in rounds:
        if step < steps:
            break
        step -= steps
    return min(1.0, (step + 1) / warmup, max(0.02, (steps - step) / (tail * steps)))


def optimise(
    run: Run,
    stage: str,
    modules: nn.ModuleDict,
    loss_at: Callable[[int], Tensor],
    rounds: int | Sequence[int],
    lr: float,
    ema: float,
    on_save: Callable[[nn.ModuleDict], None] | None = None,
) -> nn.ModuleDict:
    """AdamW over ``rounds`` of steps with a decaying rate, clipping and an exponential moving
    average, which is returned. A finished run goes on where its plan gains a round."""
    rounds = (rounds,) if isinstance(rounds, int) else tuple(rounds)
    steps = sum(rounds)
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
            group["lr"] = lr * decayed(step, rounds)
        loss = loss_at(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            kept = min(ema, (step + 1) / (step + 10))
            for slow, fast in zip(average.parameters(), modules.parameters(), strict=True):
                slow.lerp_(fast, 1 - kept)
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


@dataclass
class Draw:
    """One training batch: clean latents, noise, noise level and rows of the pool."""

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    rows: Tensor

    @property
    def noisy(self) -> Tensor:
        sigma = self.sigma.view(-1, *(1,) * (self.clean.ndim - 1))
        return (1 - sigma) * self.clean + sigma * self.noise


def draw(run: Run, stage: str, step: int, latents: Tensor) -> Draw:
    """Rows of ``latents`` with logit-normal noise levels, shifted as at inference."""
    generator, plan = run.generator(stage, step), run.plan
    rows = torch.randint(0, len(latents), (plan.base_batch,), generator=generator)
    clean = latents[rows].float()
    u = torch.sigmoid(torch.randn(plan.base_batch, generator=generator))
    sigma = plan.train_shift * u / (1 + (plan.train_shift - 1) * u)
    return Draw(clean, torch.randn(clean.shape, generator=generator), sigma, rows)


@torch.no_grad()
def latent_pool(
    run: Run, pool: list[Scene], encode: Callable[[Tensor], Tensor], name: str = "pool"
) -> Tensor:
    """Latents of scenes in fp16, encoded once per run."""
    if (state := run.load(name)) is None:
        parts = [encode(render_batch(part)).half() for part in batches(pool, 64)]
        state = {"latents": torch.cat(parts)}
        run.save(name, state)
        run.log(stage=name, scenes=len(pool))
    return state["latents"]


def flux_latents(vae: Any, pictures: Tensor) -> Tensor:
    """Normalised latents ``[B, C, H, W]`` of the embedded FLUX autoencoder."""
    mean = vae.encode(pictures).latent_dist.mean
    return (mean - vae.config.shift_factor) * vae.config.scaling_factor


def learn_order(
    run: Run, stage: str, encoder: Any, ids: Tensor, layer: int, steps: int, window: int = 6
) -> None:
    """Pretrain a causal text encoder: from each token's feature the words before it can be told.

    A denoiser that gives text tokens no position reads which colour belongs to which shape from
    these features alone. ``layer`` indexes the hidden states that the pipeline uses.
    """
    width, words = encoder.config.hidden_size, int(ids.max()) + 1
    head = nn.Linear(width, window * words)

    def loss_at(step: int) -> Tensor:
        rows = torch.randint(0, len(ids), (64,), generator=run.generator(stage, step))
        batch = ids[rows]
        hidden = encoder(input_ids=batch, output_hidden_states=True).hidden_states[layer]
        logits = head(hidden[:, window:]).unflatten(-1, (window, words))
        before = batch.unfold(1, window, 1)[:, :-1]  # [B, L - window, window]
        return F.cross_entropy(logits.flatten(0, 2), before.flatten())

    average = optimise(
        run, stage, nn.ModuleDict({"encoder": encoder, "head": head}), loss_at, steps, 2e-3, 0.99
    )
    encoder.load_state_dict(average["encoder"].state_dict())


def train_autoencoder(run: Run, vae: Any, loss_at: Callable[[int], Tensor]) -> None:
    """Optimise ``vae`` in place, then freeze it."""
    plan, modules = run.plan, nn.ModuleDict({"vae": vae})
    average = optimise(run, "vae", modules, loss_at, plan.vae_steps, plan.vae_lr, 0.99)
    vae.load_state_dict(average["vae"].state_dict())
    vae.requires_grad_(False).eval()


class Pool:
    """Training latents ``[N, ...]`` and their captions; row ``empty`` is the empty caption."""

    latents: Tensor

    @property
    def empty(self) -> int:
        """Row of the empty caption."""
        return len(self.latents)


# modules, pool, noisy latents, noise levels [B], guidance scales [B], rows of captions [B]
Velocity = Callable[[Any, Any, Tensor, Tensor, Tensor, Tensor], Tensor]


def match_flow(
    run: Run,
    modules: nn.ModuleDict,
    velocity: Velocity,
    pool_at: Callable[[int], Pool],
    on_save: Callable[[nn.ModuleDict], None],
) -> nn.ModuleDict:
    """Flow matching on the pool of each step: the target is noise minus data.

    Some captions are dropped; guidance 1 means unguided.
    """
    plan = run.plan

    def loss_at(step: int) -> Tensor:
        pool = pool_at(step)
        batch = draw(run, "base", step, pool.latents)
        chance = torch.rand(len(batch.rows), generator=run.generator("drop", step))
        rows = torch.where(chance < plan.caption_dropout, pool.empty, batch.rows)
        output = velocity(modules, pool, batch.noisy, batch.sigma, torch.ones(len(rows)), rows)
        return F.mse_loss(output, batch.noise - batch.clean)

    return optimise(run, "base", modules, loss_at, plan.base_steps, plan.base_lr, plan.ema, on_save)


def distil_guidance(
    run: Run, student: nn.ModuleDict, teacher: nn.ModuleDict, velocity: Velocity, pool: Pool
) -> nn.ModuleDict:
    """Teach ``guidance = g`` the frozen teacher's ``v_empty + g (v_caption - v_empty)``.

    ``student`` starts as the teacher; its text encoders stay as they are.
    """
    plan = run.plan
    student.load_state_dict(teacher.state_dict())
    for name in ("text_encoder", "text_encoder_2"):
        student[name].requires_grad_(False)
    teacher.eval()

    def loss_at(step: int) -> Tensor:
        batch = draw(run, "distill", step, pool.latents)
        count, (low, high) = len(batch.rows), plan.guidance
        scale = low + (high - low) * torch.rand(count, generator=run.generator("guidance", step))
        one, empty = torch.ones(count), torch.full((count,), pool.empty)
        with torch.no_grad():
            caption = velocity(teacher, pool, batch.noisy, batch.sigma, one, batch.rows)
            free = velocity(teacher, pool, batch.noisy, batch.sigma, one, empty)
        target = free + scale.view(-1, *(1,) * (free.ndim - 1)) * (caption - free)
        output = velocity(student, pool, batch.noisy, batch.sigma, scale, batch.rows)
        return F.mse_loss(output, target)

    return optimise(run, "distill", student, loss_at, plan.distill_steps, plan.distill_lr, 0.99)


def denoiser(pipe: Any) -> nn.ModuleDict:
    """The parts of a pipeline with two text encoders that are trained together."""
    names = ("transformer", "text_encoder", "text_encoder_2")
    return nn.ModuleDict({name: getattr(pipe, name) for name in names})


def batches(items: list, size: int) -> Iterator[list]:
    """Consecutive parts of `items`, `size` each."""
    return (items[start : start + size] for start in range(0, len(items), size))


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
