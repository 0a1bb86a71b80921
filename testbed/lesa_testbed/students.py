"""Few-step students, shipped as what they differ in from their teacher, most of it low-rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "difference.safetensors"


@torch.no_grad()
def without_guidance(transformer: Any, guidance: float) -> Any:
    """A copy of a FLUX transformer that has no guidance embedding: the one of ``guidance`` is a
    constant, added to the timestep embedding's bias."""
    student = type(transformer).from_config({**transformer.config, "guidance_embeds": False})
    student.load_state_dict(transformer.state_dict(), strict=False)
    time = transformer.time_text_embed
    bias = student.time_text_embed.timestep_embedder.linear_2.bias
    projected = time.time_proj(torch.tensor([1000.0 * guidance], device=bias.device))
    bias += time.guidance_embedder(projected)[0]
    return student.eval()


@torch.no_grad()
def save_difference(student: Any, teacher: Any, folder: Path, rank: int) -> None:
    """Write ``student - teacher`` in half precision: the best approximation of that rank for large
    matrices (``name.up @ name.down``), other parameters whole."""
    before, tensors = teacher.state_dict(), {}
    for name, value in student.state_dict().items():
        change = (value - before[name]).float()
        if change.ndim == 2 and min(change.shape) > 2 * rank:
            u, s, v = torch.linalg.svd(change, full_matrices=False)
            tensors[f"{name}.up"], tensors[f"{name}.down"] = u[:, :rank] * s[:rank], v[:rank]
        else:
            tensors[name] = change
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.half().contiguous() for name, t in tensors.items()}, folder / FILE)


@torch.no_grad()
def add_difference(teacher: Any, folder: Path) -> Any:
    """Turn ``teacher`` into the student whose difference lies in ``folder``."""
    changes: dict[str, Tensor] = load_file(folder / FILE)
    for name, value in teacher.state_dict().items():
        if name in changes:
            value += changes[name].float()
        else:
            value += changes[f"{name}.up"].float() @ changes[f"{name}.down"].float()
    return teacher
