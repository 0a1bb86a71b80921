"""Learned controls: L2P's linear map over all past outputs, and LESA as its paper trains it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from lesa.core.forecaster import Tap
from lesa.core.schedule import Schedule
from lesa.core.table import Table
from lesa.errors import LesaError
from lesa.evaluation.method import Bench, Method, Peer
from lesa.evaluation.peers.per_run_cache import once_per_bench
from lesa.evaluation.peers.thresholds import needs_calibration
from lesa.evaluation.peers.trained import trained
from lesa.forecasters.calibration import thinned
from lesa.forecasters.published import LESA_PAPER, FullStepRule
from lesa.training.collect import collect
from lesa.training.job import Job, call_arguments
from lesa.training.statistics import Statistics
from lesa.util.numerics import gradients

EPOCHS, RATE = 201, 0.01  # L2P's release
_L2P_STEPS = 50
_L2P_LISTS = {  # by N
    5: (0, 1, 2, 4, 6, 9, 14, 23, 30, 37, 44),
    7: (0, 1, 2, 4, 9, 17, 26, 35, 43),
    10: (0, 1, 2, 4, 12, 24, 38),
}


@dataclass(frozen=True, eq=False)
class L2P:
    """v_hat_s = sum_{j < s} W[s, j] v_bar_j, v_bar_j the output of a full step, else its forecast.

    weights: guidance branch -> W, float64 [S, S], strictly lower triangular. Forecasts of forecasts
    are unrolled, so that each row weighs the full steps alone and no forecast is stored.
    Source: L2P (arXiv 2604.26365).
    """

    weights: Mapping[str, Tensor]

    uses_latent = False
    tap: Tap = "output"
    name = "l2p"

    def history(self, schedule: Schedule) -> int:
        """All full steps."""
        return len(schedule.full_steps)

    def table(
        self, schedule: Schedule, sigmas: Sequence[float] = (), branch: str = "cond"
    ) -> Table:
        """The unrolled map; `sigmas` are not used.

        Raises: LesaError for another number of steps, or a branch that was not trained.
        """
        if branch not in self.weights:
            raise LesaError(f"branch={branch!r} was not trained, only {', '.join(self.weights)}")
        weights, full = self.weights[branch], schedule.full_steps
        if schedule.steps != len(weights):
            raise LesaError(
                f"num_steps={schedule.steps}, but this map is tied to {len(weights)} steps; "
                "train one for that count"
            )
        made = torch.zeros(schedule.steps, len(full), dtype=torch.float64)
        made[list(full)] = torch.eye(len(full), dtype=torch.float64)
        for step in schedule.skipped_steps:
            made[step] = weights[step, :step] @ made[:step]

        def row(step: int, cached: tuple[int, ...]) -> list[float]:
            return made[step, : len(cached)].flip(0).tolist()

        return Table.from_rows(schedule, len(full), row)


def fit_l2p(statistics: Statistics) -> L2P:
    """L2P's training on inner products: each step's output from the true outputs before it.

    The mean squared error of one step ahead, (W_s G W_s^T - 2 W_s g_s + g_ss), is summed from the
    Gram matrix G of the outputs instead of from themselves; W begins as reuse of the last output.
    Full-batch Adam at 0.01, 201 epochs. The map does not depend on the list of full steps.
    """
    return L2P({branch: _fit_map(statistics, branch) for branch in statistics.branches})


@gradients()
def _fit_map(statistics: Statistics, branch: str) -> Tensor:
    steps = statistics.num_steps
    gram = statistics.mean(branch)[:steps, :steps]
    past = torch.ones(steps, steps, dtype=torch.float64).tril(-1)
    weights = torch.diag(torch.ones(steps - 1, dtype=torch.float64), -1).requires_grad_()
    optimiser = torch.optim.Adam([weights], lr=RATE)
    for _ in range(EPOCHS):
        error = (weights * past - torch.eye(steps, dtype=torch.float64))[1:]
        loss = ((error @ gram) * error).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return weights.detach() * past


def _l2p_list(interval: int) -> Schedule:
    """The published list of an N, or of the next larger one that has a list."""
    listed = next((n for n in _L2P_LISTS if interval <= n), max(_L2P_LISTS))
    return Schedule.explicit(_L2P_LISTS[listed], _L2P_STEPS)


def l2p_schedule(wanted: int, num_steps: int) -> Schedule:
    """The published list of 50 steps with the fewest full steps that are not below `wanted`.

    For more than 11 of them, or for another step count, the list of N = 5 is spread anew with the
    same density.
    """
    densest = _l2p_list(1)
    if wanted <= len(densest.full_steps) and num_steps == _L2P_STEPS:
        return FullStepRule(_l2p_list, tuple(_L2P_LISTS)).nearest(wanted, num_steps)
    if wanted <= _L2P_STEPS:
        return thinned(densest, wanted).resampled(num_steps)
    return thinned(densest.resampled(num_steps), wanted)


@once_per_bench
def _l2p(bench: Bench) -> L2P:
    taken, _ = call_arguments(bench.pipe, dict(bench.settings))
    taken.pop("num_inference_steps", None)
    job = Job(bench.pipe, bench.calibration, taken, "output", bench.seed)
    return fit_l2p(collect(job, bench.num_steps))


@once_per_bench
def _hidden_statistics(bench: Bench) -> str:
    """The folder where `train` keeps the statistics of the hidden feature, gone with the bench: the
    first peer collects them."""
    folder = TemporaryDirectory(prefix="lesa-paper-")
    weakref.finalize(bench, folder.cleanup)
    return folder.name


class _Learned:
    """A peer that is trained on the calibration prompts, for any list."""

    takes_lists = True

    def unfit(self, bench: Bench) -> str | None:
        """It is trained on calibration prompts."""
        return needs_calibration(bench)


@dataclass(frozen=True)
class L2PPeer(_Learned):
    """L2P, trained as its authors do, on their lists."""

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """One map for all lists of a bench."""
        steps = bench.num_steps
        schedule = searched.bind(steps) if searched else l2p_schedule(wanted, steps)
        return Method(name, steps, _l2p(bench), schedule, "searched" if searched else "own")


@dataclass(frozen=True)
class PaperLesa(_Learned):
    """LESA as its paper has it: form, features, rule for the full steps, and two-phase training.

    Source: LESA (arXiv 2602.20497).
    """

    spline: str = "ridge"
    gate: str = "kan"

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """Trained anew for its list, on statistics that are collected once."""
        steps = bench.num_steps
        schedule = searched.bind(steps) if searched else LESA_PAPER.nearest(wanted, steps)
        forecaster = trained(
            bench,
            len(schedule.full_steps),
            form="paper",
            tap="hidden",
            schedule=schedule,
            folder=_hidden_statistics(bench),
            spline=self.spline,
            gate=self.gate,
        )
        return Method(name, steps, forecaster, schedule, "searched" if searched else "own")


LEARNED: dict[str, Peer] = {
    "l2p": L2PPeer(),
    "lesa-paper": PaperLesa(),
    "lesa-paper-edge": PaperLesa(spline="edge"),
    "lesa-paper-mlp": PaperLesa(gate="mlp"),
}
