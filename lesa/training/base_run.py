"""The plain run of the calibration prompts, kept on the host: no later phase runs it again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lesa.errors import LesaError
from lesa.util.ranks import Ranks

__all__ = ["BaseRun"]

SHARE = 0.25  # of the memory that is free; more of it lies in a file that is mapped


@dataclass
class BaseRun:
    """Latents and outputs of the plain run at one number of steps, of every picture.

    They are kept as the denoiser had them, in its dtype: 2 x elements of a latent x bytes for each
    step, picture and guidance branch (FLUX.1-dev at 1024 x 1024, 50 steps in bfloat16: 52 MB a
    picture).

    Attributes:
        steps: what the pipeline is asked for; a run that begins late has fewer.
        pictures: of all prompts together.
        folder: where a mapped file lies for as long as it is used; the system's own place if None.
        final: the final latents, ``[pictures, elements]`` in float64, once the run has ended.
    """

    steps: int
    pictures: int
    folder: Path | None = None
    final: Tensor | None = None
    _ends: Tensor | None = None
    _latents: dict[str, Tensor] = field(default_factory=dict)  # branch -> [steps, pictures, ...]
    _outputs: dict[str, Tensor] = field(default_factory=dict)  # [steps, pictures, parts, ...]

    def put(
        self, step: int, branch: str, pictures: Sequence[int], latent: Tensor, output: Tensor
    ) -> None:
        """Keep a step of some pictures: latent ``[pictures, ...]``, output ``[parts, pictures,
        ...]``."""
        at = torch.tensor(pictures)
        each = {
            "latent": (self._latents, latent),
            "output": (self._outputs, output.transpose(0, 1)),
        }
        for known, value in each.values():
            if branch not in known:
                shape = (self.steps, self.pictures, *value.shape[1:])
                known[branch] = self._memory(shape, value.dtype)
            # under autocast a latent changes its dtype after the first step
            known[branch][step, at] = value.detach().to("cpu", known[branch].dtype)

    def at(
        self, step: int, branch: str, pictures: Sequence[int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """What `put` was given, on a device."""
        at = torch.tensor(pictures)
        latent, output = self._latents[branch][step, at], self._outputs[branch][step, at]
        return latent.to(device), output.transpose(0, 1).to(device)

    def end(self, first: int, final: Tensor) -> None:
        """Keep the final latents ``[pictures, ...]`` of pictures from one on."""
        own = final.cpu().double().flatten(1)
        if self._ends is None:
            self._ends = own.new_zeros(self.pictures, own.shape[1])
        self._ends[first : first + len(own)] = own
        self._own[first : first + len(own)] = [True] * len(own)

    def finish(self, ranks: Ranks) -> None:
        """The run has ended, on every rank: each has put some pictures, and all get all."""
        others = ~torch.tensor(self._own)
        if ranks.size > 1:
            for kept in (*self._latents.values(), *self._outputs.values()):
                for step in kept:
                    step[others] = 0
                    ranks.assemble(step)
        assert self._ends is not None  # something was run
        self.final = ranks.assemble(self._ends)

    def __post_init__(self) -> None:
        self._own = [False] * self.pictures  # that this rank has put

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(part.nbytes for kept in (self._latents, self._outputs) for part in kept.values())

    def _memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory; where it is much, a file that is gone with the tensor."""
        import psutil  # of accelerate

        count = prod(shape)
        if count * dtype.itemsize + self.nbytes < SHARE * psutil.virtual_memory().available:
            return torch.empty(shape, dtype=dtype)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".base-run-") as file:
            _reserve(file.fileno(), count * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)


def _reserve(file: int, size: int) -> None:
    """Take the room on the disk at once: a mapped file that finds none later kills the process."""
    try:
        if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
            os.posix_fallocate(file, 0, size)
    except OSError as error:
        raise LesaError(
            f"folder: the disk has no room for {size / 1e9:.1f} GB of the plain run "
            f"({error.strerror}); free some, or train on fewer prompts"
        ) from None
