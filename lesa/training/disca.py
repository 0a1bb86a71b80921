"""Training of the form "disca": rows, gains and two blocks together, on the final latents."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from math import cos, pi
from typing import Any

import torch
from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.forecasters import LesaForecaster
from lesa.forecasters.disca import DiscaForm
from lesa.hooks.alone import check_two_blocks
from lesa.hooks.attach import attached
from lesa.hooks.model_specs import model_spec
from lesa.hooks.pipeline import find_denoisers
from lesa.hooks.plain_copy import weights_fixed
from lesa.hooks.two_blocks import TwoBlocks
from lesa.hooks.wrappers import core_of
from lesa.training.disca_data import Batch, Data
from lesa.training.disca_run import Accelerated, check_sampler
from lesa.training.job import Job
from lesa.training.objective import EXPONENT, objective
from lesa.training.search import neighbours, search_schedule, shaped
from lesa.training.statistics import Statistics

ROWS_FIRST, TOGETHER = 30, 160  # rounds of one batch: rows alone, then rows and blocks
ROW_RATE, RATE = 1e-2, 5e-4  # of Adam, at the beginning
WARM_UP = 10  # rounds
JUDGED = 4  # times on the way; the best state is kept
FLOOR = 1e-7  # of the relative squared error: what is nearer counts no more
SHAPES = 3  # lists of the prior that are tried
BACKWARD = 2  # a pass backwards costs as much as so many forwards


def check_disca(pipe: Any, counts: Sequence[int], wanted: Sequence[int]) -> None:
    """LesaError where this pipeline, or these numbers, cannot be trained for; nothing runs."""
    for name, numbers in (("num_inference_steps", counts), ("full_steps", wanted)):
        if len(numbers) > 1:
            raise LesaError(
                f"{name}={list(numbers)}: form='disca' is tied to one step list; pass one number"
            )
    models = find_denoisers(pipe)
    if len(models) > 1:
        raise LesaError(
            f"form='disca': {type(pipe).__name__} has {len(models)} transformers; use "
            "form='continuous' or 'table'"
        )
    check_two_blocks(models[0])
    check_sampler(pipe.scheduler)


def train_disca(
    job: Job,
    forecaster: LesaForecaster,
    statistics: Statistics,
    schedule: Schedule | None,
    full_steps: int,
) -> None:
    """Fit the forecaster, of form "disca", to one list: the given one, or the best of a few.

    A list is judged with rows fitted in closed loop around untrained blocks. Then Adam moves rows
    and blocks together: on `objective` of the final latents' errors, as all choices are made by,
    with gradients through the whole accelerated run.
    Each prompt is drawn with several noises, and the state is kept that is best on the prompts that
    the job holds out.

    Raises:
        LesaError: the latent cannot be followed from step to step.
    """
    check_sampler(job.pipe.scheduler, statistics)
    data = Data.of(job, statistics.num_steps)
    trainer = _Trainer(job, statistics, data, forecaster.net.history)
    if schedule is None:
        run = trainer.searched(full_steps)
    else:
        run = trainer.fitted(schedule.bind(statistics.num_steps))
    if not trainer.learn(run):
        job.interrupted(forecaster.metadata)
    _store(forecaster, run, statistics)
    forecaster.metadata["network_share"] = trainer.share
    scores, full = trainer.scores(run, data.judged), run.schedule.full_steps
    told = "prompts that were held out" if data.apart else "the prompts of the fit"
    job.progress.line(
        f"fitted: {len(full)} of {run.schedule.steps} steps in full ({', '.join(map(str, full))}), "
        f"two blocks of {100 * trainer.share:.1f} % of the parameters on the others: final "
        f"latents {scores.mean():.1f} dB mean, {scores.quantile(0.1):.1f} dB p10 above their error "
        f"on {told}"
    )


def _store(forecaster: LesaForecaster, run: Accelerated, statistics: Statistics) -> None:
    assert isinstance(forecaster.net, DiscaForm)
    latent = bool(forecaster.uses_latent)
    for branch, rows in run.rows.items():
        kept = rows.detach().cpu().double()[:, : run.history + latent]
        kept[list(run.schedule.full_steps)] = 0
        forecaster.correct(run.schedule, statistics.sigmas, branch, kept)
    gains = {branch: rows[:, -1] for branch, rows in run.rows.items()}
    forecaster.net.learn(run.blocks.state_dict(), gains)


class _Trainer:
    """Makes accelerated runs, fits them and counts what that costs."""

    def __init__(self, job: Job, statistics: Statistics, data: Data, history: int) -> None:
        self.job, self.statistics, self.data, self.history = job, statistics, data, history
        self.model = core_of(job.models[0])
        assert attached(self.model) is None
        self.blocks = TwoBlocks(self.model).float()
        self.share = _numbers(self.blocks) / _numbers(self.model)

    def searched(self, full_steps: int) -> Accelerated:
        """The best of what the statistics tell, of some of the prior's lists, and of neighbours."""
        steps = self.statistics.num_steps
        told = search_schedule(self.statistics, full_steps).full_steps
        tried: dict[tuple[int, ...], tuple[float, Accelerated]] = {}
        # a few coefficients are not fitted too closely to judge; the rest is in those held out
        few = self.data.few
        judges = [*few, *self.data.judged] if self.data.apart else few

        def best(lists: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
            for full in lists:
                if full not in tried:
                    run = self.fitted(Schedule.explicit(full, steps))
                    tried[full] = objective(self.scores(run, judges)), run
                    bar.advance(1)
            return max(tried, key=lambda full: tried[full][0])

        with self.job.phase("choose the list", 0) as bar:
            found = best([told, *shaped(full_steps, self.statistics)[:SHAPES]])
            found = best(neighbours(found, steps, reach=1))
            bar.detail = f"{len(tried)} lists with rows around untrained blocks"
        return tried[found][1]

    def fitted(self, schedule: Schedule) -> Accelerated:
        """A run around the untrained blocks, whose rows are fitted in closed loop, each to the
        plain run's outputs at its step."""
        latent = model_spec(self.model).latent
        run = Accelerated(self.model, self.blocks, latent, schedule, self.statistics, self.history)
        with torch.no_grad():
            run.together(self.data.few, fit=True)
        self._count(run, self.data.few)
        return run

    @torch.no_grad()
    def scores(self, run: Accelerated, batches: Sequence[Batch]) -> Tensor:
        """10 log10 of the final latent's mean square over its squared error, per picture."""
        self._count(run, batches)
        return torch.cat([-10 * _error(run(b), b).clamp_min(FLOOR).log10() for b in batches])

    def learn(self, run: Accelerated) -> bool:
        """Rows alone, then rows and blocks; the run is in the state that judged best. Whether it
        came to the end: an interrupt keeps what is the best so far."""
        blocks, rows = [*run.blocks.parameters()], [*run.rows.values()]
        best, order = [self._state(run)], self._order()
        alone = [{"params": rows, "lr": ROW_RATE}]
        both = [{"params": blocks, "lr": RATE}, {"params": rows, "lr": ROW_RATE / 2}]
        with weights_fixed(self.model), self.job.phase("train", ROWS_FIRST + TOGETHER) as bar:
            bar.detail = f"{ROWS_FIRST + TOGETHER} rounds of {self.job.batch_size} pictures"
            try:
                for groups, turns in ((alone, ROWS_FIRST), (both, TOGETHER)):
                    run.blocks.requires_grad_(groups is both)
                    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
                    for turn in range(turns):
                        self._move(run, next(order), optimizer, _fading(turn, turns))
                        bar.advance(1)
                        if (turn + 1) % max(1, TOGETHER // JUDGED) == 0 or turn + 1 == turns:
                            best = [max(*best, self._state(run), key=_quality)]
                ended = True
            except KeyboardInterrupt:
                ended = False
        run.load_state_dict(best[0][1])
        run.requires_grad_(False)
        return ended

    def _order(self) -> Iterator[Batch]:
        """The batches of the fit again and again, shuffled."""
        draw = torch.Generator().manual_seed(self.job.seed)
        while True:
            for i in torch.randperm(len(self.data.fitted), generator=draw).tolist():
                yield self.data.fitted[i]

    def _move(
        self, run: Accelerated, batch: Batch, optimizer: torch.optim.Optimizer, fading: float
    ) -> None:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * fading
        optimizer.zero_grad()
        ((_error(run(batch), batch) + FLOOR) ** EXPONENT).mean().log().div(EXPONENT).backward()
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._count(run, [batch], 1 + BACKWARD)

    def _state(self, run: Accelerated) -> tuple[float, dict[str, Tensor]]:
        quality = objective(self.scores(run, self.data.judged))
        return quality, copy.deepcopy(run.state_dict())

    def _count(self, run: Accelerated, batches: Sequence[Batch], times: int = 1) -> None:
        """Rows of the denoiser that these runs were worth, two blocks by their parameters."""
        pictures = sum(len(batch.latents[0]) for batch in batches)
        steps = len(run.schedule.full_steps) + self.share * len(run.schedule.skipped_steps)
        self.job.work.rows += round(times * steps * pictures * self.job.work.width)


def _error(final: Tensor, batch: Batch) -> Tensor:
    """Squared error of the final latents over the plain ones' mean square, [pictures]."""
    plain = batch.latents[-1].to(final.device).float().flatten(1)
    return (final.float().flatten(1) - plain).square().mean(1) / plain.square().mean(1)


def _fading(turn: int, turns: int) -> float:
    """A rate's share: a short rise, then half a cosine."""
    return min(1.0, (turn + 1) / WARM_UP) * (1 + cos(pi * turn / turns)) / 2


def _quality(state: tuple[float, dict[str, Tensor]]) -> float:
    return state[0]


def _numbers(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
