"""Phase 2: ground-truth guided fits, from inner products alone (no model runs, no features)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn

from lesa.core.schedule import Schedule
from lesa.forecasters import LesaForecaster
from lesa.forecasters.paper import PaperForm
from lesa.training.statistics import Statistics
from lesa.util.numerics import gradients
from lesa.util.progress import Progress

LONGEST_GAP = 12  # steps between full steps that random step lists reach


def minimise(
    net: nn.Module,
    loss: Callable[[], Tensor],
    title: str,
    progress: Progress,
    *,
    iterations: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> list[float]:
    """Descend on ``loss()`` by AdamW with a cosine decay; returns all losses.

    Args:
        net: the module whose parameters move.
        loss: computes a differentiable scalar.
        title: of the progress bar.
        progress: where the bar is shown.
        iterations: number of steps.
        lr: the first learning rate; the last is a fiftieth of it.
        betas: of AdamW.
    """
    optimiser = torch.optim.AdamW(net.parameters(), lr=lr, betas=betas, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations, eta_min=lr / 50)
    losses = []
    with progress.bar(title, iterations) as bar:
        for _ in range(iterations):
            value = loss()
            optimiser.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            decay.step()
            losses.append(value.item())
            bar.advance()
        bar.detail = f"relative RMS error {_smooth(losses):.4f} after {iterations} iterations"
    return losses


@gradients()
def fit_continuous(
    forecaster: LesaForecaster,
    statistics: Sequence[Statistics],
    *,
    iterations: int = 600,
    batch: int = 512,
    lr: float = 3e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    """Fit the KAN on random step lists: minimise the relative RMS error of forecasts of the base
    features.

    Every draw is a target step and K cached steps before it; its squared error is c^T G c over
    their (K + 2)-square part of the mean Gram matrix. Step counts and branches take turns.
    Returns the last losses (relative RMS errors), smoothed.
    """
    progress = progress or Progress(quiet=True)
    generator = torch.Generator().manual_seed(seed)
    parts = cycle([(each, name, each.mean(name)) for each in statistics for name in each.branches])

    def loss() -> Tensor:
        source, branch, gram = next(parts)
        drawn = draw_steps(source.num_steps, forecaster.settings.history, batch, generator)
        return _drawn_error(forecaster, source.sigmas, branch, gram, drawn)

    title, net = "fit on plain runs", forecaster.net
    losses = minimise(net, loss, title, progress, iterations=iterations, lr=lr, betas=(0.9, 0.99))
    return _smooth(losses)


def _smooth(losses: Sequence[float]) -> float:
    """The last of them, as a moving average of some twenty."""
    found = losses[0]
    for value in losses[1:]:
        found = 0.95 * found + 0.05 * value
    return found


def _drawn_error(
    forecaster: LesaForecaster,
    sigmas: Sequence[float],
    branch: str,
    gram: Tensor,
    drawn: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Mean relative RMS error over drawn targets, cached steps and which of these exist."""
    target, cached, valid = drawn
    levels = torch.tensor(sigmas, dtype=torch.float64)
    weights = forecaster.coefficients(levels[target], levels[cached], valid, branch)
    latent = [target[:, None] + len(sigmas) - 1] if forecaster.uses_latent else []
    columns = torch.cat([cached, *latent, target[:, None]], 1)
    error = torch.cat([weights, -torch.ones_like(weights[:, :1])], 1)
    moments = gram[columns[:, :, None], columns[:, None, :]]
    energy = torch.einsum("ni,nij,nj->n", error, moments, error) / gram[target, target]
    return (energy.clamp(min=0) + 1e-8).sqrt().mean()


def draw_steps(
    num_steps: int, history: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random targets ``[N]``, cached steps ``[N, K]`` newest first and which of them exist; step
    0 is always cached."""
    target = torch.randint(1, num_steps, (count,), generator=generator)
    longest = torch.randint(1, LONGEST_GAP + 1, (count, 1), generator=generator)
    gaps = 1 + (torch.rand(count, history, generator=generator) * longest).long()
    cached = target[:, None] - gaps.cumsum(1)
    valid = cached >= 0
    first_missing = (
        ~valid
        & (torch.cat([torch.full((count, 1), True), valid[:, :-1]], 1))
        & (torch.cat([target[:, None], cached[:, :-1]], 1) > 0)
    )
    return target, cached.clamp(min=0), valid | first_missing


@gradients()
def fit_paper(
    forecaster: LesaForecaster,
    statistics: Statistics,
    schedule: Schedule,
    visits: Callable[[PaperForm], dict[str, Tensor]] | None = None,
    *,
    iterations: int = 200,
    lr: float = 5e-3,
    progress: Progress | None = None,
) -> tuple[float, float]:
    """The paper's two phases for its own form, on inner products.

    Ground-truth guided: the window holds base features. Closed loop, two epochs: it holds the
    forecasts themselves, unrolled over the whole run, and the features of the full steps; both are
    linear in a basis, so that the error is again c^T G c. ``visits`` runs the pipeline with the
    forecasts and tells its features at the full steps (`lesa.training.on_policy.visited_gram`),
    anew for each epoch; without it the base run's stand in for them. Returns the relative RMS
    errors of both phases.
    """
    progress = progress or Progress(quiet=True)
    net = forecaster.net
    assert isinstance(net, PaperForm)
    base = {branch: statistics.mean(branch) for branch in statistics.branches}
    epochs = [("fit on plain runs", False, lr)] + 2 * [("fit on forecasts", True, lr / 4)]
    results = []
    for title, unrolled, rate in epochs:
        grams, visited = base, None
        if visits is not None and unrolled:
            grams, visited = visits(net), statistics.num_steps
        loss = partial(_mean_error, net, grams, statistics.sigmas, schedule, unrolled, visited)
        results.append(minimise(net, loss, title, progress, iterations=iterations, lr=rate)[-1])
    return results[0], results[-1]


def _mean_error(
    net: PaperForm,
    grams: Mapping[str, Tensor],
    sigmas: Sequence[float],
    schedule: Schedule,
    unrolled: bool,
    visited: int | None,
) -> Tensor:
    """`_window_error` averaged over the guidance branches."""
    errors = [
        _window_error(net, gram, sigmas, schedule, branch, unrolled, visited)
        for branch, gram in grams.items()
    ]
    return torch.stack(errors).mean()


def _window_error(
    net: PaperForm,
    gram: Tensor,
    sigmas: Sequence[float],
    schedule: Schedule,
    branch: str,
    unrolled: bool,
    visited: int | None,
) -> Tensor:
    """Mean relative RMS error over the skipped steps, with base features or own forecasts in the
    window. The Gram matrix begins with the base features and ends with the constant; `visited` is
    where the features of the full steps begin, if they are others than the base run's."""
    rows, bias = net.rows(schedule, sigmas, branch)
    unit = torch.eye(len(gram), dtype=torch.float64)
    window: list[Tensor] = []  # newest first, each a vector in the basis
    errors = []
    for step in range(schedule.steps):
        feature = unit[step]
        if not schedule.is_full(step):
            held = torch.stack(window[: net.history])
            forecast = rows[step, : len(held)] @ held + bias[step] * unit[-1]
            errors.append(forecast - unit[step])
            feature = forecast if unrolled else unit[step]
        elif visited is not None:
            feature = unit[visited + schedule.full_steps.index(step)]
        window.insert(0, feature)
    at, error = list(schedule.skipped_steps), torch.stack(errors)
    energy = ((error @ gram) * error).sum(1) / gram.diagonal()[at]
    return (energy + 1e-8).sqrt().mean()
