"""What a token-wise cache keeps of one block, and which of its tokens are computed now."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

Clusters = tuple[Tensor, Tensor]  # one token of each, [B, K], and the cluster of each token, [B, N]


class Rule(Protocol):
    """Which tokens a skipped step computes, and what the others get.

    A stream is "text" or "image", or "joint" for [text, image] in blocks with one stream.
    """

    @property
    def order(self) -> int:
        """Of the forecast of a cached output: 0 is reuse, 1 is linear in the steps."""

    @property
    def needs_map(self) -> bool:
        """Must full steps tell how much attention every token receives?"""

    def pick(self, cell: Cell, stream: str) -> Tensor:
        """Indices [B or 1, n] of the tokens to compute, none of them twice with other values."""

    def blend(self, cell: Cell, site: str, stream: str, fresh: Tensor, index: Tensor) -> Tensor:
        """A sub-layer's output [B, N, C], given that of the computed tokens, [B, n, C]."""

    def learn(self, moment: Moment, text: Tensor, image: Tensor) -> None:
        """Look at the tokens behind the blocks with two streams, at a full step."""


@dataclass
class Moment:
    """What the blocks of one guidance branch share.

    interval: steps per full step, in the mean. since: steps since the last full step, 0 at one.
    clusters: stream -> what ClusCa made of it at the last full step.
    """

    interval: float
    step: int = -1
    since: int = 0
    clusters: dict[str, Clusters] = field(default_factory=dict)


@dataclass
class _Known:
    """A sub-layer's output, its step, and its change per step since the full step before."""

    value: Tensor
    step: int
    slope: Tensor | None = None


class Cell:
    """The cache of one block in one guidance branch.

    depth: 0 in the first block of its kind, 1 in the last. single: has the block one stream?
    ages: stream -> steps since each token was computed, [B, N]. received: stream -> attention that
    each token got at the last full step, [B, N], summed over those that look, mean of the heads.
    """

    def __init__(self, rule: Rule, moment: Moment, depth: float, single: bool) -> None:
        self.rule, self.moment, self.depth, self.single = rule, moment, depth, single
        self.ages: dict[str, Tensor] = {}
        self.received: dict[str, Tensor] = {}
        self._outputs: dict[str, _Known] = {}
        self._kept: dict[str, Tensor] = {}

    @property
    def full(self) -> bool:
        """Whether all tokens are computed now."""
        return self.moment.since == 0

    def pick(self, stream: str, tokens: Tensor) -> Tensor | None:
        """Indices [B, n] of the tokens [B, N, C] to compute now; None for all of them."""
        if self.full:
            self.ages[stream] = tokens.new_zeros(tokens.shape[:2])
            return None
        index = self.rule.pick(self, stream).expand(len(tokens), -1)
        self.ages[stream] = (self.ages[stream] + 1).scatter(1, index, 0.0)
        return index

    def settle(self, site: str, stream: str, fresh: Tensor, index: Tensor | None) -> Tensor:
        """The whole output of a sub-layer: `fresh` at a full step, else blended with what is
        known."""
        if index is not None:
            return self.rule.blend(self, site, stream, fresh, index)
        last, step, slope = self._outputs.get(site), self.moment.step, None
        if self.rule.order and last is not None:
            slope = (fresh - last.value) / (step - last.step)
        self._outputs[site] = _Known(fresh, step, slope)
        return fresh

    def forecast(self, site: str) -> Tensor:
        """What is known of a sub-layer's output now."""
        known = self._outputs[site]
        return known.value if known.slope is None else known.value + self.moment.since * known.slope

    def overwrite(self, site: str, value: Tensor) -> None:
        """Keep a newer output than that of the last full step."""
        self._outputs[site].value = value

    def refresh(self, name: str, fresh: Tensor, index: Tensor | None) -> Tensor:
        """Keys or values of all tokens, [B, N, H, D]: new for those that are computed, for the
        others as they were last computed."""
        self._kept[name] = fresh if index is None else put(self._kept[name], index, fresh)
        return self._kept[name]

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        held = [*self._kept.values(), *self.received.values(), *self.ages.values()]
        for known in self._outputs.values():
            held += [known.value] if known.slope is None else [known.value, known.slope]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        return sum(storages.values())


def take(tokens: Tensor, index: Tensor | None) -> Tensor:
    """Some tokens [B, n, ...] of [B, N, ...] by index [B, n]; all of them for None."""
    return tokens if index is None else tokens[_rows(tokens), index]


def put(tokens: Tensor, index: Tensor, fresh: Tensor) -> Tensor:
    """A copy of the tokens [B, N, ...] with those at index [B, n] replaced."""
    return tokens.index_put((_rows(tokens), index), fresh)


def _rows(tokens: Tensor) -> Tensor:
    return torch.arange(len(tokens), device=tokens.device)[:, None]
