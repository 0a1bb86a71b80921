"""How alike outputs are at different noise levels: all that a forecaster keeps of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Moments(nn.Module):
    """Mean inner products of the base runs' features and latents, as functions of noise level.

    `levels` [T] decrease, T the steps of the run that they were taken from. `grams[branch]` is over
    (v_0 .. v_{T-1}) or (v_0 .. v_{T-1}, x_0 .. x_{T-1}). Float32 on the host whatever happens to
    the parameters; empty where nothing was kept. They are stored with the forecaster.
    """

    def __init__(self) -> None:
        super().__init__()
        self.levels = torch.empty(0)
        self.grams: dict[str, Tensor] = {}

    def keep(self, sigmas: Sequence[float], grams: Mapping[str, Tensor], latent: bool) -> None:
        """Take the inner products of a run with these T + 1 noise levels; of `grams` the first T
        rows, or 2 T with the latents, count."""
        count = len(sigmas) - 1
        size = count * (1 + latent)
        self.levels = torch.tensor(sigmas[:count], dtype=torch.float32, device="cpu")
        self.grams = {
            branch: gram[:size, :size].to("cpu", torch.float32, copy=True)
            for branch, gram in grams.items()
        }

    def at(self, branch: str, levels: Sequence[float], latent: bool) -> Tensor | None:
        """Inner products at other noise levels: float64 [n, n], or [2 n, 2 n] with the latents.

        Features in between are taken as lying on the straight line between their neighbours. None
        where nothing was kept of this branch, or no latents.
        """
        gram, count = self.grams.get(branch), len(self.levels)
        if gram is None or len(gram) < count * (1 + latent):
            return None
        between = interpolation(self.levels.tolist(), levels)
        basis = torch.block_diag(*[between] * (1 + latent))
        used = gram[: basis.shape[1], : basis.shape[1]].double()
        return basis @ used @ basis.T

    def places(self, levels: Sequence[float]) -> list[float]:
        """Where noise levels lie in the run that was kept, in fiftieths of its steps; the last one
        stands for all below."""
        count = len(self.levels)
        steps = torch.arange(count, dtype=torch.float64, device="cpu") * (50 / count)
        return (interpolation(self.levels.tolist(), levels) @ steps).tolist()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.grams:
            destination[prefix + "levels"] = self.levels
        for branch, gram in self.grams.items():
            destination[f"{prefix}gram.{branch}"] = gram

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *others: Any
    ) -> None:
        errors: list[str] = others[-1]
        found = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        levels = found.pop("levels", torch.empty(0)).to("cpu", torch.float32)
        grams = {k.removeprefix("gram."): v.to("cpu", torch.float32) for k, v in found.items()}
        if problem := _problem(levels, grams):
            errors.append(f"{prefix}{problem}")
            return
        self.levels, self.grams = levels, grams


def _problem(levels: Tensor, grams: Mapping[str, Tensor]) -> str | None:
    """What is wrong with inner products from a file."""
    count = levels.numel()
    if levels.ndim != 1 or not bool((levels.diff() < 0).all()) or (grams and count < 2):
        return "levels is not a decreasing list of noise levels"
    for branch, gram in grams.items():
        if list(gram.shape) not in ([count, count], [2 * count, 2 * count]):
            return f"gram.{branch} is {list(gram.shape)} for {count} noise levels"
        if not bool(gram.isfinite().all()) or not bool((gram.diagonal() > 0).all()):
            return f"gram.{branch} holds no inner products"
    return None


def interpolation(nodes: Sequence[float], at: Sequence[float]) -> Tensor:
    """Weights [len(at), len(nodes)], float64, of straight lines between decreasing nodes; beyond
    the first and the last one their values stay."""
    places = torch.tensor(nodes, dtype=torch.float64, device="cpu")
    wanted = torch.tensor(at, dtype=torch.float64, device="cpu")
    wanted = wanted.clamp(float(places[-1]), float(places[0]))
    weights = torch.zeros(len(at), len(nodes), dtype=torch.float64, device="cpu")
    if len(nodes) == 1:
        return weights + 1
    low = (torch.searchsorted(-places, -wanted, right=True) - 1).clamp(0, len(nodes) - 2)
    share = (places[low] - wanted) / (places[low] - places[low + 1])
    rows = torch.arange(len(at), device="cpu")
    weights[rows, low], weights[rows, low + 1] = 1 - share, share
    return weights
