"""A batch's plain run, step by step, and its inner products at the end."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lesa.errors import LesaError
from lesa.hooks.denoiser import Denoiser
from lesa.training.base_run import BaseRun
from lesa.training.job import followed, parts_of, sample_of
from lesa.training.statistics import inner_products
from lesa.training.work import Work

__all__ = ["Collector", "Trajectories"]


class Collector:
    """Controller that runs every step in full and keeps one batch's trajectory until ``reduce``.

    A branch's features are ``[rows, pictures, D]`` per step: with batched guidance one call holds
    several rows of every picture.
    """

    def __init__(self, tap: str, work: Work, base: BaseRun | None = None) -> None:
        self.tap, self.work, self.base = tap, work, base
        self.sigmas: tuple[float, ...] = ()
        self.pictures, self.first = 1, 0
        self.peak_bytes = 0
        self._forget()

    def _forget(self) -> None:
        self.features: dict[str, list[Tensor]] = {}
        self.latents: list[Tensor] = []

    def __call__(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = followed(denoiser, kwargs)
        self.sigmas = step.sigmas
        output, feature, _ = denoiser.run(args, kwargs, tap=self.tap == "hidden")
        latent = denoiser.latent(args, kwargs)
        sample = sample_of(denoiser, output, latent)
        if self.tap == "output":
            feature = sample
        if feature is None or sample is None:
            raise LesaError(
                f"tap={self.tap!r}: {denoiser.original_class.__name__} returns no single tensor to "
                "train on; accelerate it without training, by lesa.enable(pipe)"
            )
        rows = parts_of(len(feature), self.pictures)
        known = self.features.setdefault(step.branch, [])
        known.append(feature.detach().reshape(rows, self.pictures, -1).clone())
        self.work.feature_bytes = feature[0].nbytes
        self.work.argument_bytes = _row_bytes((args, kwargs), len(feature))
        begins = step.branch == next(iter(self.features))
        self.work.computed(len(feature), done=self.pictures * begins)
        if self.base is not None and isinstance(latent, Tensor):
            at = range(self.first, self.first + self.pictures)
            parts = sample.unflatten(0, (rows, self.pictures))
            self.base.put(step.index, step.branch, at, latent[: self.pictures], parts)
        alike = isinstance(latent, Tensor) and latent.shape == feature.shape
        if self.tap == "output" and alike and len(self.latents) < len(known):
            self.latents.append(latent[: self.pictures].detach().flatten(1).clone())
        return output

    def reduce(self, final: Tensor) -> Trajectories:
        """The batch that ended in the latents ``final``, as inner products; forgets it.

        Raises LesaError where the branches or their rows changed from step to step.
        """
        branches, latents = self.features, self.latents
        steps = len(self.sigmas) - 1
        rows = {name: len(features[0]) for name, features in branches.items()}
        for name, features in branches.items():
            if len(features) != steps or any(len(part) != rows[name] for part in features):
                raise LesaError(
                    f"call: guidance branch {name!r} is not the same at all steps of this "
                    "pipeline; train with one that guides every step alike"
                )
        parts = [
            feature[row]
            for name, features in branches.items()
            for row in range(rows[name])
            for feature in features
        ]
        if len(latents) == steps:
            fits = final.numel() == latents[0].numel()
            parts += [*latents, *([final.flatten(1).to(latents[0])] if fits else [])]
        basis = [*parts, torch.ones_like(parts[0])]
        self.peak_bytes = max(self.peak_bytes, sum(part.nbytes for part in basis))
        grams = [
            inner_products(torch.stack([part[i] for part in basis])) for i in range(self.pictures)
        ]
        joint = torch.stack(grams)
        if not bool(joint.isfinite().all()):
            raise LesaError(
                "pipe: the plain run gives values that are not finite, of which nothing can be "
                "learned; run the pipeline in another dtype, or repair it"
            )
        self._forget()
        return Trajectories(rows, len(parts) - steps * sum(rows.values()), joint)


def _row_bytes(arguments: Any, rows: int) -> int:
    """Bytes of the tensors of a call, however nested, that hold so many rows; of one row."""
    leaves = tree_leaves(arguments)
    return sum(
        leaf.nbytes // rows
        for leaf in leaves
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows
    )


class Trajectories(NamedTuple):
    """One batch: rows per branch, number of latents, Gram matrices ``[pictures, M, M]``."""

    rows: dict[str, int]
    num_latents: int
    joint: Tensor
