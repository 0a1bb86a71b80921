"""Which tokens ToCa, DuCa and ClusCa compute on a skipped step, and what the others get.

In the authors' code for FLUX a skipped step takes attention outputs from the cache and computes
chosen tokens in the MLPs alone (ClusCa in the two-stream blocks alone). Here chosen tokens pass
every sub-layer of every block, with the keys and values of the others as they were last computed:
that is what the papers describe, and it is the better of the two for each of the three (0.1 to
1.0 dB in the mean at 10 of 50 full steps on 4 prompts of the embedded pipeline).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from lesa.evaluation.peers.tokenwise.memory import Cell, Clusters, Moment, put, take


@dataclass(frozen=True)
class ToCa:
    """Tokens that receive much attention, or were left out for long, are computed.

        score = received / |received| + age_weight * age / interval

    The tokens with the highest score are computed, the others get the cached output, into which
    the computed ones are written. With depth l in [0, 1] the share of the tokens is
    0.4 * ratio * (1.5 - l) in blocks with two streams and 1.6 * ratio * (1.5 - l) in the others,
    rounded up to whole tokens. Source: ToCa (arXiv 2410.05317), its authors' settings for FLUX;
    their bonus for spatially even choices is off there too.
    """

    ratio: float = 0.1
    age_weight: float = 0.25

    order = 0
    needs_map = True

    def pick(self, cell: Cell, stream: str) -> Tensor:
        """Indices [B, n] of the tokens with the highest score."""
        ages = cell.ages[stream]
        score = self.score(cell, stream) + self.age_weight * ages / cell.moment.interval
        share = self.ratio * (1.5 - cell.depth) * (1.6 if cell.single else 0.4)
        return score.topk(ceil(min(share, 1.0) * ages.shape[1])).indices

    def score(self, cell: Cell, stream: str) -> Tensor:
        """Importance [B or 1, N] of the tokens, whatever their age."""
        return normalize(cell.received[stream], dim=-1)

    def blend(self, cell: Cell, site: str, stream: str, fresh: Tensor, index: Tensor) -> Tensor:
        """The cached output with that of the computed tokens, which is kept."""
        cell.overwrite(site, put(cell.forecast(site), index, fresh))
        return cell.forecast(site)

    def learn(self, moment: Moment, text: Tensor, image: Tensor) -> None:
        """Nothing: its scores come from the attention."""


@dataclass(frozen=True)
class DuCa(ToCa):
    """ToCa on the first, third, ... skipped step after a full one; pure reuse on the others.

    The score is random in place of attention, which its authors find no worse and which needs no
    attention map; all pictures of a batch draw the same tokens. Their further shortcut, which skips
    even the reuse block by block in the second half of the steps, is left out.
    Source: DuCa (arXiv 2412.18911).
    """

    needs_map = False

    def pick(self, cell: Cell, stream: str) -> Tensor:
        """Indices [B, n], or [1, 0] on a step of pure reuse."""
        if cell.moment.since % 2 == 0:
            return cell.ages[stream].new_empty(1, 0, dtype=torch.int64)
        return super().pick(cell, stream)

    def score(self, cell: Cell, stream: str) -> Tensor:
        """Uniform random numbers [1, N], other ones at every step."""
        ages = cell.ages[stream]
        return _drawn(cell.moment.step, ages.shape[1], ages.device).to(ages)


@dataclass(frozen=True)
class ClusCa:
    """One token of each cluster is computed and passed on to the others of the cluster.

        f_i = F_i + since * (F_i - F'_i) / (p - p'),    f_i + spread * (v_c(i) - f_i)

    F and F' are the outputs at the last full steps p and p', v_c(i) that of the computed token of
    the cluster; the computed token keeps its own. Clusters: k-means of the text and of the image
    tokens behind the last two-stream block of a full step; the computed token is the one nearest to
    the centre (the authors take one at random). Source: ClusCa (arXiv 2509.10312): 16 clusters,
    and for FLUX spread 0.005 on linear forecasts.
    """

    clusters: int = 16
    spread: float = 0.005

    order = 1
    needs_map = False

    def pick(self, cell: Cell, stream: str) -> Tensor:
        """Indices [B, K] of one token of each cluster."""
        return cell.moment.clusters[stream][0]

    def blend(self, cell: Cell, site: str, stream: str, fresh: Tensor, index: Tensor) -> Tensor:
        """The forecast drawn towards the computed token of the cluster."""
        own = cell.forecast(site)
        passed_on = take(fresh, cell.moment.clusters[stream][1])
        return put(own + self.spread * (passed_on - own), index, fresh)

    def learn(self, moment: Moment, text: Tensor, image: Tensor) -> None:
        """Cluster the tokens of both streams, and of [text, image] as both side by side."""
        texts, images = kmeans(text, self.clusters), kmeans(image, self.clusters)
        index = torch.cat([texts[0], images[0] + text.shape[1]], 1)
        member = torch.cat([texts[1], images[1] + texts[0].shape[1]], 1)
        moment.clusters = {"text": texts, "image": images, "joint": (index, member)}


@lru_cache(maxsize=8)
def _drawn(step: int, tokens: int, device: torch.device) -> Tensor:
    """The random numbers [1, N] of a step, drawn on the host and copied once for all blocks."""
    draw = torch.Generator().manual_seed(step)
    return torch.rand(1, tokens, generator=draw).to(device)


def kmeans(tokens: Tensor, clusters: int, rounds: int = 10) -> Clusters:
    """K-means of tokens [B, N, C] in the L1 distance, as ClusCa's authors do, from evenly spaced
    tokens as first centres.

    Returns the token nearest to each centre, [B, K], and the cluster of each token, [B, N], where K
    is at most N. A cluster that loses all its tokens keeps its centre.
    """
    tokens = tokens.float()
    clusters = min(clusters, tokens.shape[1])
    start = torch.arange(clusters, device=tokens.device) * tokens.shape[1] // clusters
    centres = tokens[:, start]
    for _ in range(rounds):
        nearest = torch.cdist(tokens, centres, p=1).argmin(-1)  # [B, N]
        belongs = one_hot(nearest, clusters).to(tokens)  # [B, N, K]
        size = belongs.sum(1)[..., None]  # [B, K, 1]
        means = belongs.mT @ tokens / size.clamp(min=1)
        centres = torch.where(size > 0, means, centres)
    distance = torch.cdist(tokens, centres, p=1)
    return distance.argmin(1), distance.argmin(-1)
