"""DisCa as a peer for few-step models: a small predictor, trained here, in place of all blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import cos, pi
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils._pytree import tree_map

from lesa.core.schedule import Schedule
from lesa.evaluation.method import Bench, Method, Use
from lesa.evaluation.peers.disca_predictor import EMBEDDERS, Predictor, containers, ordinary
from lesa.evaluation.peers.thresholds import needs_calibration
from lesa.evaluation.runs import generate
from lesa.hooks.attach import controlled
from lesa.hooks.denoiser import Denoiser
from lesa.hooks.pipeline import find_denoiser
from lesa.hooks.prompt_inputs import pictures_per_prompt, settings_of
from lesa.hooks.wrappers import core_of
from lesa.util.numerics import gradients

MOST_STEPS = 16
PROMPTS = 32
BATCH = 8
ROUNDS = 4  # the first on true states, the others on its own
EPOCHS = 4  # of every round, on the samples of all rounds so far
RATE = 1e-3


@dataclass(frozen=True)
class DisCa:
    """A trained predictor between full steps that are spread evenly, or listed."""

    takes_lists = True

    def unfit(self, bench: Bench) -> str | None:
        """It needs a model that it can imitate, few steps, and prompts to be trained on."""
        if bench.num_steps > MOST_STEPS:
            return f"is made for few-step models; give at most {MOST_STEPS} steps"
        name = None if bench.pipe is None else type(core_of(find_denoiser(bench.pipe))).__name__
        if name not in EMBEDDERS:
            return f"is written for {' and '.join(EMBEDDERS)}, not {name}; leave it out"
        return needs_calibration(bench)

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """At full steps floor(i S / wanted), or at a given list; trains the predictor."""
        steps = bench.num_steps
        even = Schedule.explicit((i * steps // wanted for i in range(wanted)), steps)
        schedule = even if searched is None else searched.bind(steps)
        predictor = train_predictor(bench, schedule)
        share = count_parameters(predictor) / count_parameters(find_denoiser(bench.pipe))
        return Method(
            name,
            steps,
            schedule=schedule,
            origin="own" if searched is None else "searched",
            applied=partial(disca, predictor=predictor, schedule=schedule),
            note=f"a predictor of {100 * share:.1f} % of the parameters on skipped steps",
        )


DISTILLED = {"disca": DisCa()}


@contextmanager
def disca(pipe: Any, predictor: Predictor, schedule: Schedule) -> Iterator[Use]:
    """DisCa on a pipeline for a while: the predictor runs in place of all blocks on skipped steps.

    The model's embedders, final norm and projection run at every step. The cache is one feature
    [B, L, C] per guidance branch.
    """
    controller = _Controller(predictor, schedule)
    with controlled([find_denoiser(pipe)], controller, pipe):
        yield Use(lambda: sum(feature.nbytes for feature in controller.cached.values()))


@gradients()
def train_predictor(bench: Bench, schedule: Schedule) -> Predictor:
    """A predictor for one list of full steps, trained on the bench's first 32 calibration prompts.

    Minimises the mean squared error of the forecast of the feature before the final norm, with
    Adam in minibatches of one step of 8 pictures: first on the states of the plain run, then in
    three rounds also on those of its own accelerated run, where the target is what the whole model
    gives in the same state. Every round draws other noise. The GAN stage that follows in the paper
    is left out: it serves the look and not the distance to the plain run; its gain is not measured.
    """
    model = core_of(find_denoiser(bench.pipe))
    predictor = Predictor(model).requires_grad_()
    optimizer = torch.optim.Adam(predictor.parameters(), lr=RATE)
    order = torch.Generator().manual_seed(bench.seed)
    samples: list[_Sample] = []
    for stage in range(ROUNDS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 + cos(pi * stage / ROUNDS)) / 2
        samples += _collect(bench, _Teacher(predictor, schedule, own_states=stage > 0), stage)
        for _ in range(EPOCHS):
            for i in torch.randperm(len(samples), generator=order).tolist():
                _learn(predictor, optimizer, samples[i])
    return predictor.requires_grad_(False)


def count_parameters(module: nn.Module) -> int:
    """How many numbers a module has learned."""
    return sum(parameter.numel() for parameter in module.parameters())


class _Controller:
    """Runs the whole model at full steps, the predictor in place of its blocks at the others."""

    def __init__(self, predictor: Predictor, schedule: Schedule) -> None:
        self.predictor, self.schedule = predictor, schedule
        self.cached: dict[str, Tensor] = {}  # by guidance branch

    def __call__(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = denoiser.clock.tick(kwargs)
        if step.fresh:
            self.cached.clear()
        known = step.branch in self.cached and step.problem is None
        if known and not self.schedule.is_full(step.index):
            return self.skip(denoiser, self.cached[step.branch], args, kwargs)
        run = denoiser.run(args, kwargs, tap=True)
        assert run.feature is not None
        self.cached[step.branch] = run.feature.clone()
        return run.output

    def skip(
        self, denoiser: Denoiser, cached: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One skipped step from the last full step's feature."""
        self.predictor.cached = cached
        with _in_place_of_blocks(core_of(denoiser.model), self.predictor):
            return denoiser.run(args, kwargs).output


class _Sample(NamedTuple):
    """One skipped step of some pictures: what the first block gets, the feature of the last full
    step, and the one that the whole model gives."""

    inputs: dict[str, Any]
    cached: Tensor
    target: Tensor


class _Teacher(_Controller):
    """Also runs the whole model at skipped steps, and keeps what the predictor learns from.

    The run goes on with the model's output, or with `own_states` with the predictor's.
    """

    def __init__(self, predictor: Predictor, schedule: Schedule, own_states: bool) -> None:
        super().__init__(predictor, schedule)
        self.own_states = own_states
        self.samples: list[_Sample] = []

    def skip(
        self, denoiser: Denoiser, cached: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with _first_inputs(core_of(denoiser.model)) as inputs:
            run = denoiser.run(args, kwargs, tap=True)
        assert run.feature is not None
        self.samples.append(_Sample(inputs, cached, run.feature.clone()))
        return super().skip(denoiser, cached, args, kwargs) if self.own_states else run.output


def _collect(bench: Bench, teacher: _Teacher, stage: int) -> list[_Sample]:
    """The skipped steps of all prompts, from other noise in every round."""
    prompts = bench.calibration[:PROMPTS]
    settings = {**bench.settings, "num_inference_steps": bench.num_steps, "output_type": "latent"}
    each = pictures_per_prompt(settings)
    seed = bench.seed + stage * each * len(prompts)
    with controlled([find_denoiser(bench.pipe)], teacher, bench.pipe):
        for start in range(0, len(prompts), BATCH):
            rows = range(start, min(start + BATCH, len(prompts)))
            own = settings_of(settings, rows, len(bench.calibration))
            seeds = range(seed + each * rows.start, seed + each * rows.stop)
            generate(bench.pipe, [prompts[row] for row in rows], seeds, own)
    return teacher.samples


def _learn(predictor: Predictor, optimizer: torch.optim.Optimizer, sample: _Sample) -> None:
    sample = tree_map(ordinary, sample)
    predictor.cached = sample.cached
    _, forecast = predictor(**sample.inputs)
    optimizer.zero_grad()
    mse_loss(forecast, sample.target).backward()
    optimizer.step()


@contextmanager
def _in_place_of_blocks(model: Any, predictor: Predictor) -> Iterator[None]:
    """The predictor is the model's only block for a while."""
    first, *others = names = containers(model)
    before = {name: model._modules[name] for name in names}
    model._modules[first] = nn.ModuleList([predictor])
    model._modules |= {name: nn.ModuleList() for name in others}
    try:
        yield
    finally:
        model._modules |= before


@contextmanager
def _first_inputs(model: Any) -> Iterator[dict[str, Any]]:
    """The keyword arguments of the model's first block, filled when it runs."""
    found: dict[str, Any] = {}
    first = next(iter(getattr(model, containers(model)[0])))
    hook = first.register_forward_pre_hook(lambda _, args, kw: found.update(kw), with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()
