"""Inner products of base trajectories: all that fitting and schedule search need to know of
them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lesa.errors import LesaError

FORMAT = 1


@dataclass
class Statistics:
    """Gram matrices of one step count: per branch and prompt, over the features and latents of
    the base run.

    The basis of branch ``b`` is (v_0 .. v_{T-1}, x_0 .. x_{T-1}, 1): the tapped feature and the
    denoiser's latent at each step, and the constant (``[P, 2T + 1, 2T + 1]``, float64, mean over
    elements). Without latents (hidden tap, or a latent of another shape) the x part is absent.
    Any forecast that is linear in this basis has the squared error c^T G c. Additive over
    prompts, so that machines can collect apart and concatenate.
    """

    sigmas: tuple[float, ...]
    tap: str
    has_latent: bool
    grams: dict[str, Tensor] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    setting: str = ""

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def size(self) -> int:
        """Length of the basis."""
        return self.num_steps * (1 + self.has_latent) + 1

    def latent(self, step: int) -> int:
        """Index of x_step in the basis; v_step has the index ``step``, the constant the index
        -1."""
        return self.num_steps + step

    def mean(self, branch: str) -> Tensor:
        """Gram matrix averaged over prompts, ``[size, size]``."""
        return self.grams[branch].mean(0)

    def extend(self, branch: str, grams: Tensor) -> None:
        """Add the Gram matrices ``[P, size, size]`` of more prompts."""
        known = self.grams.get(branch)
        self.grams[branch] = grams if known is None else torch.cat([known, grams])

    def save(self, path: Path) -> int:
        """Write upper triangles to a safetensors file (temporary name first); returns its
        bytes."""
        rows, columns = torch.triu_indices(self.size, self.size)
        tensors = {
            f"gram.{branch}": gram[:, rows, columns].contiguous()
            for branch, gram in self.grams.items()
        }
        meta = {
            "format": FORMAT,
            "sigmas": self.sigmas,
            "tap": self.tap,
            "has_latent": self.has_latent,
            "prompts": self.prompts,
            "setting": self.setting,
        }
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"lesa": json.dumps(meta)})
        partial.replace(path)
        return path.stat().st_size

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what ``save`` wrote.

        Raises LesaError for a file that is damaged or of another format.
        """
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads(file.metadata()["lesa"])
                packed = {key.removeprefix("gram."): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise LesaError(
                f"statistics file {path} cannot be read ({error}): delete it and collect again"
            ) from error
        if meta.pop("format", None) != FORMAT:
            raise LesaError(
                f"statistics file {path} has another format than {FORMAT}: delete it and collect "
                "again"
            )
        found = cls(**{**meta, "sigmas": tuple(meta["sigmas"])})
        rows, columns = torch.triu_indices(found.size, found.size)
        for branch, values in packed.items():
            gram = values.new_zeros(len(values), found.size, found.size)
            gram[:, rows, columns] = values
            gram[:, columns, rows] = values
            found.grams[branch] = gram
        return found


def gram(basis: Tensor, chunk: int = 1 << 20) -> Tensor:
    """Inner products of the rows of ``[M, D]`` in float64, divided by D; ``chunk`` elements are
    upcast at a time."""
    total = torch.zeros(basis.shape[0], basis.shape[0], dtype=torch.float64)
    width = max(1, chunk // basis.shape[0])
    for part in basis.split(width, dim=1):
        wide = part.double()
        total += (wide @ wide.T).cpu()
    return total / basis.shape[1]
