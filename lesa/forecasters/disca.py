"""The form of few-step models: fitted rows, and a small network that runs on skipped steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.forecasters.continuous import TableForm
from lesa.forecasters.settings import Settings

__all__ = ["MOST_BYTES", "DiscaForm"]

MOST_BYTES = 16 << 30  # of a file with a predictor: two blocks of FLUX.1 are 2 GB in float32
_WEIGHT, _GAIN = "predictor.", "gain."  # how its tensors are called in a file


class DiscaForm(TableForm):
    """v_s = sum_k c[s, k] v_k + c[s, latent] x_s + gain[s] P(x_s, bridge)

    with the calibrated rows c, and the output P of two blocks that run in the place of all on the
    current latent and on what the last full step cached (`lesa.hooks.two_blocks`). It is tied to
    one step list and its noise levels: rows and gains are fitted together with the network.

    Attributes:
        weights: the network's tensors by name, as its state dict has them; empty untrained.
        gains: guidance branch -> gain [S].
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.weights: dict[str, Tensor] = {}
        self.gains: dict[str, Tensor] = {}

    def learn(self, weights: Mapping[str, Tensor], gains: Mapping[str, Tensor]) -> None:
        """Keep a trained network and its gains, on the host in float32."""
        self.weights = {name: _kept(part) for name, part in weights.items()}
        self.gains = {branch: _kept(part) for branch, part in gains.items()}

    def check_run(self, fitted: bool, known: Iterable[Schedule]) -> None:
        """LesaError where nothing was `fitted` to a run; `known` are the lists of others. One
        sentence for all of them: an engine counts how often it hears it."""
        if not fitted:
            lists = " or ".join(map(str, known)) or "no list yet"
            raise LesaError(
                f"form='disca': it is tied to the list and the noise levels that it was trained "
                f"for, {lists}; run those undisturbed, or train one for this run"
            )

    def check_count(self, full_steps: int, known: Iterable[Schedule]) -> None:
        """LesaError for another number of full steps than those of the `known` lists."""
        counts = [len(schedule.full_steps) for schedule in known]
        if full_steps not in counts:
            raise LesaError(
                f"full_steps={full_steps}: form='disca' is tied to the list that it was trained "
                f"for ({' or '.join(map(str, counts))} full steps); leave it out, or train one for "
                "that"
            )

    def stored(self) -> dict[str, Tensor]:
        """What a file holds of it."""
        gains = {_GAIN + name: part for name, part in self.gains.items()}
        return gains | {_WEIGHT + name: part for name, part in self.weights.items()}

    def take(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `stored`: its tensors leave the dict.

        Raises:
            LesaError: there is no network, or no gain for each of the guidance branches.
        """
        weights, gains = _taken(tensors, _WEIGHT), _taken(tensors, _GAIN)
        if not weights or set(gains) != set(self.settings.branches):
            raise LesaError(
                "form='disca': the weights hold no predictor with a gain for each guidance branch; "
                "copy the folder again, or train anew"
            )
        self.learn(weights, gains)


def _kept(part: Tensor) -> Tensor:
    return part.detach().to("cpu", torch.float32).contiguous()


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}
