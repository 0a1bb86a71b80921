"""The accelerated run of the form "disca" as one differentiable function of its network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.hooks.added_noise import adds_noise, is_multistep
from lesa.hooks.outputs import read_sample, without_variance
from lesa.hooks.two_blocks import Bridge, Noted, TwoBlocks
from lesa.training.disca_data import Batch
from lesa.training.row_fit import ridge_fit
from lesa.training.sampler import Sampler
from lesa.training.statistics import Statistics

RIDGE = 1e-4  # ties rows to the network's output alone, relative to the regressors' mean energy


class Accelerated(nn.Module):
    """v_s = sum_k rows[s, k] v_k + rows[s, latent] x_s + rows[s, -1] P(x_s), then the sampler.

    The model's own weights are fixed. Where gradients are on they go through full steps too: an
    error is judged by what it makes of the final latent.

    Attributes:
        blocks: P, in float32; several runs may share them.
        rows: guidance branch -> float32 [S, K + 2]; the last column is the gain.
        spares_memory: whether a full step is run again for its gradients, instead of keeping what
            its blocks made; on the host, where memory is cheap, it is not.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: TwoBlocks,
        latent: str,
        schedule: Schedule,
        statistics: Statistics,
        history: int,
    ) -> None:
        super().__init__()
        assert statistics.sampler is not None  # `check_sampler` has asked
        self.blocks = blocks
        self.rows = nn.ParameterDict(
            {name: torch.zeros(schedule.steps, history + 2) for name in statistics.branches}
        )
        for rows in self.rows.values():
            rows.data[:, -1] = 1
        self._model = [model]  # no part of this module
        self._latent, self.schedule, self.statistics = latent, schedule, statistics
        self.sampler: Sampler = statistics.sampler
        self.history = history
        self.spares_memory = self._device.type != "cpu"

    def forward(self, batch: Batch, *, fit: bool = False) -> Tensor:
        """The final latents [pictures, ...] of a run from the batch's noise."""
        return self.together([batch], fit=fit)[0]

    def together(self, batches: Sequence[Batch], *, fit: bool = False) -> list[Tensor]:
        """Final latents of several batches; with `fit` each row is fitted on all of them at its
        step, to the plain run's outputs."""
        states = [_State(batch, batch.latents[0].to(self._device)) for batch in batches]
        for step in range(self.schedule.steps):
            moved = [self.sampler.keep[step].item() * state.latent for state in states]
            for branch in self.statistics.branches:
                outputs = self._outputs(step, branch, states, fit)
                for i, (state, output) in enumerate(zip(states, outputs, strict=True)):
                    parts = output.unflatten(0, (-1, len(state.latent)))
                    for part, place in zip(parts, self.statistics.places(branch), strict=True):
                        moved[i] = moved[i] + self.sampler.rates[step, place].item() * part
            for state, latent in zip(states, moved, strict=True):
                state.latent = latent.to(state.latent.dtype)
        return [state.latent for state in states]

    def _outputs(self, step: int, branch: str, states: Sequence[_State], fit: bool) -> list[Tensor]:
        if self.schedule.is_full(step):
            return [self._full(step, branch, state) for state in states]
        columns = [self._regressors(step, branch, state) for state in states]
        held = [i for i, column in enumerate(columns[0]) if column is not None]
        if fit:
            row, width = self.rows[branch], self.history + 2
            parts = [
                torch.cat([c[i].float().flatten() for c in columns if c[i] is not None])  # type: ignore[union-attr]
                for i in held
            ]
            target = torch.cat([state.batch.outputs[step, branch].flatten() for state in states])
            start = torch.eye(len(held), dtype=torch.float64)[-1]
            found = ridge_fit(parts, target.to(parts[0]), start, RIDGE)
            row.data[step] = torch.zeros(width).index_copy(0, torch.tensor(held), found.float())
        row = self.rows[branch][step]
        return [
            torch.stack([row[i] * c[i].float() for i in held]).sum(0).to(c[-1].dtype)  # type: ignore[union-attr]
            for c in columns
        ]

    def _full(self, step: int, branch: str, state: _State) -> Tensor:
        def computed(latent: Tensor) -> tuple[Tensor, Bridge]:
            noted, run = Noted(), lambda: self._run(step, branch, state, latent)
            with noted.of(self.model):
                output = run()
            return output, self.blocks.bridge(self.model, noted, run)

        if self.spares_memory and torch.is_grad_enabled() and state.latent.requires_grad:
            made = checkpoint(computed, state.latent, use_reentrant=False)
        else:
            made = computed(state.latent)
        output, state.bridges[branch] = made
        ring = state.rings.setdefault(branch, [])
        ring.insert(0, output)
        del ring[self.history :]
        return output

    def _regressors(self, step: int, branch: str, state: _State) -> list[Tensor | None]:
        """The cached outputs, the latent where it is one, and the network's output."""
        ring = state.rings[branch]
        with self.blocks.in_place_of_blocks(self.model, state.bridges[branch]):
            predicted = self._run(step, branch, state, state.latent)
        own = state.latent.repeat(len(predicted) // len(state.latent), *[1] * (predicted.ndim - 1))
        latent = own if self.statistics.has_latent else None
        return [*ring, *[None] * (self.history - len(ring)), latent, predicted]

    def _run(self, step: int, branch: str, state: _State, latent: Tensor) -> Tensor:
        given = tree_map(self._moved, state.batch.calls[step, branch])
        rows = len(state.batch.outputs[step, branch]) // len(latent)
        given[self._latent] = latent.repeat(rows, *[1] * (latent.ndim - 1))
        sample = read_sample(self.model(**given))
        assert sample is not None
        return without_variance(sample, given[self._latent])

    def _moved(self, part: Any) -> Any:
        return part.to(self._device) if isinstance(part, Tensor) else part

    @property
    def model(self) -> nn.Module:
        """The model, whose weights stay as they are."""
        return self._model[0]

    @property
    def _device(self) -> torch.device:
        return self.blocks.join.weight.device


@dataclass
class _State:
    """Where an accelerated run stands."""

    batch: Batch
    latent: Tensor
    rings: dict[str, list[Tensor]] = field(default_factory=dict)
    bridges: dict[str, Bridge] = field(default_factory=dict)


def check_sampler(scheduler: object, statistics: Statistics | None = None) -> None:
    """LesaError where the latent cannot be followed from step to step: as far as the scheduler's
    class tells, or as the statistics of the plain runs do."""
    if statistics is None:
        wrong = adds_noise(scheduler, {}) or is_multistep(scheduler)
    else:
        sampler = statistics.sampler
        wrong = sampler is None or not sampler.trusted or not statistics.has_latent
    if wrong:
        raise LesaError(
            f"scheduler={type(scheduler).__name__}: form='disca' follows the latent from step to "
            "step, which this one's outputs alone do not tell; use a first-order scheduler as "
            "FlowMatchEulerDiscreteScheduler, or form='continuous'"
        )
