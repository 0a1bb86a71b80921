"""Inner products of base trajectories: all that fitting and schedule search need to know of
them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from lesa.errors import LesaError
from lesa.training.sampler import Sampler, identify
from lesa.training.statistics_check import FORMAT, MOST, REMEDY, described, unpacked
from lesa.util.files import named_path, read_file, write_atomically
from lesa.util.numerics import float64
from lesa.util.tensor_file import read_tensors


@dataclass
class Statistics:
    """Gram matrices of one step count, one per picture, over the features and latents of its base
    run.

    ``rows`` names the guidance branches in the order of their calls, with the number of rows that
    each computes per picture: {"cond": 1, "uncond": 1} where the pipeline calls the denoiser twice,
    {"default": 2} where it batches both. The basis is (v_0 .. v_{T-1} for every row of every
    branch, x_0 .. x_T, 1): the tapped features, the denoiser's latents (x_T is the final one) and
    the constant; ``joint`` is [P, M, M], float64 on the host, mean over elements. ``num_latents``
    is T + 1, or T without the final latent, or 0 (hidden tap, or a latent of another shape). Any
    forecast that is linear in this basis has the squared error c^T G c. Additive over pictures, so
    that machines can collect apart and concatenate. ``setting`` is a hash of what it was collected
    with, which ``depends_on`` names. ``probed`` is the sampler where this basis
    cannot tell it (hidden tap).

    Fits see one branch at a time, in the basis (v_0 .. v_{T-1}, x_0 .. x_{T-1}, 1): the rows of a
    branch share a table, so that only their sum with guidance weights matters, and that sum is the
    v of ``grams``. Where the weights are unknown every row is a picture of its own.
    """

    sigmas: tuple[float, ...]
    tap: str
    num_latents: int
    rows: dict[str, int]
    joint: Tensor = field(default_factory=lambda: torch.empty(0))
    prompts: list[str] = field(default_factory=list)
    setting: str = ""
    depends_on: dict[str, str] = field(default_factory=dict)
    probed: Sampler | None = None

    @property
    def num_steps(self) -> int:
        """T, the steps of its runs."""
        return len(self.sigmas) - 1

    @property
    def branches(self) -> tuple[str, ...]:
        """The guidance branches, in the order of their calls."""
        return tuple(self.rows)

    @property
    def has_latent(self) -> bool:
        """Are the latents part of the basis?"""
        return self.num_latents > 0

    @property
    def size(self) -> int:
        """Length of a branch's basis."""
        return self.num_steps * (1 + self.has_latent) + 1

    @property
    def joint_size(self) -> int:
        """M, the length of the joint basis."""
        return self.num_steps * sum(self.rows.values()) + self.num_latents + 1

    def latent(self, step: int) -> int:
        """Index of x_step in a branch's basis; v_step has the index ``step``, the constant the
        index -1."""
        return self.num_steps + step

    @cached_property
    def sampler(self) -> Sampler | None:
        """How outputs move the latent; None where the final latent is not in the basis, and nobody
        has told it."""
        if self.probed is not None or self.num_latents <= self.num_steps:
            return self.probed
        return identify(self.joint.mean(0), self.num_steps, sum(self.rows.values()))

    def weights(self, branch: str) -> Tensor | None:
        """Guidance weights of a branch's rows, sum 1, by the steps whose outputs move the latent;
        None where they are unknown."""
        if self.sampler is None:
            return None
        rates = self.sampler.rates[:, self.places(branch)]
        shares = (rates / rates.sum(1, keepdim=True)).nanmedian(0).values
        weights = shares / shares.sum()
        return weights if weights.isfinite().all() else None

    def ways(self, branch: str) -> Tensor:
        """Row weights under which a branch is seen ``[N, rows]``: its guidance weights, or one row
        at a time where they are unknown."""
        weights = self.weights(branch)
        if weights is None:
            return torch.eye(self.rows[branch], dtype=torch.float64)
        return weights[None]

    def influence(self) -> dict[str, npt.NDArray[np.float64]]:
        """Per branch d x_T / d v_s ``[T]``, by the noise levels alone where nothing is known."""
        if self.sampler is None:
            return {branch: np.diff(np.array(self.sigmas)) for branch in self.branches}
        found = self.sampler.influence()
        return {branch: found[:, self.places(branch)].sum(1).numpy() for branch in self.branches}

    def final_energy(self) -> npt.NDArray[np.float64]:
        """Mean square of the last latent per picture ``[P]``; 1 where there are no latents."""
        if not self.has_latent:
            return np.ones(len(self.joint))
        return self.joint[:, -2, -2].numpy()

    def embed(self, branch: str, weights: Tensor) -> Tensor:
        """A branch's basis in the joint one, ``[joint_size, size]``, for some row weights."""
        steps, total = self.num_steps, self.num_steps * sum(self.rows.values())
        matrix = torch.zeros(self.joint_size, self.size, dtype=torch.float64)
        unit = torch.eye(steps, dtype=torch.float64)
        for row, weight in zip(self.places(branch), weights.tolist(), strict=True):
            matrix[row * steps : (row + 1) * steps, :steps] = weight * unit
        if self.has_latent:
            matrix[total : total + steps, steps : 2 * steps] = unit
        matrix[-1, -1] = 1
        return matrix

    @cached_property
    def grams(self) -> dict[str, Tensor]:
        """Per branch ``[P, size, size]``, or ``[P x rows, size, size]`` without weights."""
        found = {}
        for branch in self.branches:
            matrices = [self.embed(branch, way) for way in self.ways(branch)]
            found[branch] = torch.cat([m.T @ self.joint @ m for m in matrices])
        return found

    def mean(self, branch: str) -> Tensor:
        """A branch's Gram matrix averaged over pictures, ``[size, size]``."""
        return self.grams[branch].mean(0)

    def extend(self, joint: Tensor, prompts: Sequence[str]) -> None:
        """Add the Gram matrices ``[P, M, M]`` of more pictures, of these prompts."""
        self.joint = torch.cat([self.joint, joint]) if len(self.joint) else joint
        self.prompts += prompts
        for name in ("sampler", "grams"):  # computed from all pictures
            self.__dict__.pop(name, None)

    def places(self, branch: str) -> range:
        """Places of a branch's rows among all rows."""
        before = sum(list(self.rows.values())[: self.branches.index(branch)])
        return range(before, before + self.rows[branch])

    def save(self, path: Path) -> int:
        """Write upper triangles to a safetensors file; returns its bytes."""
        rows, columns = torch.triu_indices(self.joint_size, self.joint_size)
        tensors = {"gram": self.joint[:, rows, columns].contiguous()}
        meta = {
            "format": FORMAT,
            "sigmas": self.sigmas,
            "tap": self.tap,
            "num_latents": self.num_latents,
            "rows": self.rows,
            "prompts": self.prompts,
            "setting": self.setting,
            "depends_on": self.depends_on,
        }
        content = tensors_to_bytes(tensors, metadata={"lesa": json.dumps(meta)})
        write_atomically(path, content)
        return len(content)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what ``save`` wrote.

        Raises LesaError for a file that is damaged, of another format, or whose values no
        collection gives.
        """
        name = f"statistics file {named_path(path)}"
        tensors, metadata = read_tensors(read_file(path, MOST, REMEDY), name, REMEDY)
        try:
            found = cls(**described(metadata))
            found.joint = unpacked(tensors.get("gram"), found.joint_size, len(found.prompts))
        except LesaError as error:
            raise LesaError(f"{name}: {error}") from None
        return found


def inner_products(basis: Tensor, chunk: int = 1 << 20) -> Tensor:
    """Inner products of the rows of ``[M, D]``, divided by D, on the host; taken in float64 where
    the rows lie (`lesa.util.numerics.float64`), ``chunk`` elements being upcast at a time."""
    total = torch.zeros(basis.shape[0], basis.shape[0], dtype=torch.float64)
    width = max(1, chunk // basis.shape[0])
    for part in basis.split(width, dim=1):
        wide = float64(part)
        total += (wide @ wide.T).cpu()
    return (total + total.T) / (2 * basis.shape[1])  # symmetric to the last bit
