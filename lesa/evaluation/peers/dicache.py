"""DiCache: the first block, run at every step, decides and scales what the others added."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from lesa.core.schedule import Schedule
from lesa.evaluation.method import Bench, Method, Peer, Use
from lesa.evaluation.peers.controller import StepCache
from lesa.evaluation.peers.layouts import all_blocks, bound_arguments, unfit_layout
from lesa.evaluation.peers.teacache import relative_change
from lesa.evaluation.peers.thresholds import Applied, adaptive, needs_calibration
from lesa.hooks.attach import controlled
from lesa.hooks.denoiser import Denoiser
from lesa.hooks.pipeline import find_denoiser
from lesa.hooks.step_clock import Step

__all__ = ["PROBED", "DiCache", "dicache", "scale"]

LEAST, MOST = 1.0, 1.5  # of the scale; released


@dataclass
class _State:
    tokens: Tensor | None = None  # into the first block, one step ago
    probe: Tensor | None = None  # out of it
    distance: float = 0.0
    residuals: list[Tensor] = field(default_factory=list)  # of all blocks, newest first
    probes: list[Tensor] = field(default_factory=list)  # of the first block, at the same steps


class DiCache(StepCache[_State]):
    """Skipped while sum |d(y) - d(x)| < threshold since the last full step; with x the embedded
    tokens, y = x + q what the first block (depth 1, as released) makes of them, and d the relative
    L1 change from step to step. The forecast is

        h_hat_s = x_s + r_2 + g (r_1 - r_2), g = mean |q_s - q_2| / mean |q_1 - q_2| in [1, 1.5],

    from r = what all blocks added at the two last full steps, q = what the first one added there;
    x_s + r_1 where there is one full step. A full step goes on from the first block. The first and
    the last step are full. The release also offers d(y) alone with the first fifth of the run in
    full, which is more than 10 of 50 steps.
    Source: DiCache (arXiv 2508.17356), in the form of its released code.
    """

    def __init__(self, model: nn.Module, threshold: float) -> None:
        super().__init__(model)
        self._threshold = threshold
        self._state, self._forced = _State(), True
        self._forecast: Tensor | None = None  # of this call, where its other blocks are skipped

    def begin(self) -> _State:
        return _State()

    def step(
        self, denoiser: Denoiser, step: Step, state: _State, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        self._state, self._forecast = state, None
        self._forced = state.tokens is None or step.index == step.num_steps - 1
        run = denoiser.run(args, kwargs, tap=True)
        if self._forecast is None:
            assert run.feature is not None and state.tokens is not None
            assert state.probe is not None
            self.full_calls += 1
            state.distance = 0.0
            state.residuals = [run.feature - state.tokens, *state.residuals[:1]]
            state.probes = [state.probe - state.tokens, *state.probes[:1]]
        self._forecast = None
        return run.output

    def run_block(self, forward: Callable[..., Any], place: int, *args: Any, **kwargs: Any) -> Any:
        """The forward of one block of the model: the first runs and decides for the others."""
        if place and self._forecast is None:
            return forward(*args, **kwargs)
        given = bound_arguments(forward, args, kwargs)
        tokens, text = given["hidden_states"], given["encoder_hidden_states"]
        if place:
            return self._pair(self._forecast, text)
        made = forward(*args, **kwargs)
        self._decide(tokens, made[self.layout.picture])
        return made

    def _pair(self, picture: Any, text: Any) -> tuple[Any, Any]:
        return (text, picture) if self.layout.picture else (picture, text)

    def _decide(self, tokens: Tensor, probe: Tensor) -> None:
        state = self._state
        if state.tokens is not None and state.probe is not None:
            moved = relative_change(tokens, state.tokens)
            state.distance += abs(relative_change(probe, state.probe) - moved)
        if not self._forced and state.distance < self._threshold:
            newest, *older = state.residuals
            if older:
                newest = older[0] + scale(probe - tokens, state.probes) * (newest - older[0])
            self._forecast = tokens + newest
        state.tokens, state.probe = tokens, probe


def scale(now: Tensor, probes: list[Tensor]) -> float:
    """g: how far the first block's residual has gone from the older full step's, as a share of the
    way to the newer one's, in [1, 1.5]."""
    newest, older = probes
    share = float((now - older).abs().mean() / (newest - older).abs().mean())
    return min(max(share, LEAST), MOST)


@contextmanager
def dicache(pipe: Any, threshold: float) -> Iterator[Use]:
    """DiCache on a pipeline for a while; every block has a forward of its own meanwhile."""
    model = find_denoiser(pipe)
    cache = DiCache(model, threshold)
    blocks = all_blocks(cache.core, cache.spec)
    own = [vars(block).get("forward") for block in blocks]  # of accelerate, which offloads them
    with controlled([model], cache, pipe):
        for place, block in enumerate(blocks):
            block.forward = partial(cache.run_block, block.forward, place)
        try:
            yield Use(lambda: cache.cache_bytes, lambda: cache.full_steps)
        finally:
            for block, before in zip(blocks, own, strict=True):
                del block.forward
                if before is not None:
                    block.forward = before


@dataclass(frozen=True)
class DiCachePeer:
    """DiCache at the threshold that spends the wanted number of full steps."""

    takes_lists = False

    def unfit(self, bench: Bench) -> str | None:
        """It looks into the blocks, and needs prompts for its threshold."""
        return unfit_layout(bench) or needs_calibration(bench)

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """The threshold with the fewest full steps that are not below `wanted` in the mean."""

        def applied(threshold: float) -> Applied:
            return partial(dicache, threshold=threshold)

        return adaptive(name, wanted, bench, applied, "first block at every step; ")


PROBED: dict[str, Peer] = {"dicache": DiCachePeer()}
