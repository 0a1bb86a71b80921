"""SenCache: skip while latent and time have moved less than the model's output is sensitive to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lesa.core.schedule import Schedule
from lesa.evaluation.method import Bench, Method, Peer
from lesa.evaluation.peers.controller import controlled
from lesa.evaluation.peers.layouts import unfit_layout
from lesa.evaluation.peers.residual import Residual, ResidualCache
from lesa.evaluation.peers.sensitivity import Sensitivities, moment, sensitivities
from lesa.evaluation.peers.thresholds import Applied, adaptive, needs_calibration
from lesa.hooks.denoiser import Denoiser
from lesa.hooks.step_clock import Step

__all__ = ["SENSITIVE", "SenCache", "sencache"]

IN_A_ROW = 10  # skipped steps at most, as in the released script


@dataclass
class _State(Residual):
    latent: Tensor | None = None
    time: float = 0.0
    at: int = 0


class SenCache(ResidualCache[_State]):
    """Skipped while (a_x |x_s - x_p| + a_t |t_s - t_p|) / sqrt(N) < threshold; h_hat_s = x_s + r_p.

    p is the last full step, a_x and a_t are the output's calibrated sensitivities there, norms are
    Euclidean over the N elements of the latent, t is the model's own time. The released code has a
    second threshold for the first fifth of the run, 44 times smaller in its example, and lets the
    prompt's branch decide for both; here one threshold holds for all steps, as in the formula, and
    each guidance branch decides for itself. The sensitivities are taken on plain runs of the
    calibration prompts, not on noised data.
    Source: SenCache (arXiv 2602.24208).

    longest: how many steps in a row are skipped at most.
    """

    def __init__(
        self, model: nn.Module, threshold: float, known: Sensitivities, longest: int
    ) -> None:
        super().__init__(model)
        self._threshold, self._known, self._longest = threshold, known, longest

    def begin(self) -> _State:
        return _State()

    def step(
        self, denoiser: Denoiser, step: Step, state: _State, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        latent, time = moment(denoiser, args, kwargs)
        near = step.index - state.at <= self._longest
        if state.latent is not None and near:
            moved = float((latent - state.latent).norm()), abs(time - state.time)
            per_change = self._known[step.branch][state.at]
            expected = sum(a * b for a, b in zip(per_change, moved, strict=True))
            if expected / latent.numel() ** 0.5 < self._threshold:
                return self.reuse(denoiser, state, args, kwargs)
        state.latent, state.time, state.at = latent.clone(), time, step.index
        return self.compute(denoiser, state, args, kwargs)[0]


def sencache(threshold: float, known: Sensitivities, longest: int) -> Applied:
    """Pipeline -> the context manager that puts SenCache on it; see `SenCache`."""
    return lambda pipe: controlled(pipe, lambda model: SenCache(model, threshold, known, longest))


@dataclass(frozen=True)
class SenCachePeer:
    """SenCache at the threshold that spends the wanted number of full steps.

    At most 10 steps in a row are skipped, the default of the released script, unless `wanted` rules
    that out. (Its example of 3 would leave an even list at 13 of 50 full steps, and none below.)
    """

    takes_lists = False

    def unfit(self, bench: Bench) -> str | None:
        """It looks into the blocks, and needs prompts for sensitivities and threshold."""
        return unfit_layout(bench) or needs_calibration(bench)

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """The threshold with the fewest full steps that are not below `wanted` in the mean."""
        steps = bench.num_steps
        longest = IN_A_ROW if wanted * (IN_A_ROW + 1) >= steps else steps
        known = sensitivities(bench)

        def applied(threshold: float) -> Applied:
            return sencache(threshold, known, longest)

        return adaptive(name, wanted, bench, applied)


SENSITIVE: dict[str, Peer] = {"sencache": SenCachePeer()}
