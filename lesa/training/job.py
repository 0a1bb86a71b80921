"""What every phase of a training run shares: the pipeline, the prompts and how to call it."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from lesa.errors import LesaError
from lesa.forecasters.source import is_hub_id
from lesa.hooks.added_noise import adds_noise
from lesa.hooks.attach import controlled
from lesa.hooks.denoiser import Controller, Denoiser
from lesa.hooks.outputs import read_sample, without_variance
from lesa.hooks.pipeline import find_denoisers
from lesa.hooks.pipeline_state import guidance_scales
from lesa.hooks.prompt_inputs import pictures_per_prompt, prompt_arguments
from lesa.hooks.scheduler_advice import advice
from lesa.hooks.step_clock import Step
from lesa.hooks.text_encoders import encode_once
from lesa.hooks.timed_run import generators, loop_bar
from lesa.hooks.weights_hash import weights_hash
from lesa.training.base_run import BaseRun
from lesa.training.work import Work
from lesa.util.progress import Bar, Progress
from lesa.util.ranks import Ranks

Item = TypeVar("Item")


@dataclass(frozen=True)
class Job:
    """A pipeline, its calibration prompts, and the arguments of every call of it.

    held_out: the numbers of the prompts that nothing is fitted to, only judged on. call: further
    arguments of ``pipe(...)``; embeddings hold one row per prompt. tap: the feature
    to forecast. seed: picture i starts from noise seed + i, whatever batch it runs in. batch_size:
    rows that the denoiser computes at once. folder: where statistics are kept, or None. ranks: who
    shares the denoiser's batches; all else every rank does for itself, with the same results.
    """

    pipe: Any
    prompts: Sequence[str]
    call: dict[str, Any] = field(default_factory=dict)
    tap: str = "output"
    seed: int = 0
    batch_size: int = 8
    folder: Path | None = None
    progress: Progress = field(default_factory=lambda: Progress(quiet=True))
    work: Work = field(default_factory=Work)
    held_out: frozenset[int] = frozenset()
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def models(self) -> list[torch.nn.Module]:
        """The modules that the pipeline denoises with: one, or one after the other."""
        return find_denoisers(self.pipe)

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes; under offload its weights lie elsewhere between calls."""
        weights = next(self.models[0].parameters()).device
        return torch.device(getattr(self.pipe, "_execution_device", weights))

    @property
    def pictures(self) -> int:
        """Pictures or videos per prompt."""
        return pictures_per_prompt(self.call)

    def run(
        self, rows: Sequence[int], num_inference_steps: int, output_type: str = "latent"
    ) -> torch.Tensor:
        """Final latents of one call of the pipeline for some prompts, ``[len(rows) x pictures,
        ...]``, or what else it returns for an ``output_type``; every picture of prompt ``i`` from a
        noise source of its own, always the same."""
        fixed = {"output_type": output_type, "return_dict": False}
        arguments = prompt_arguments(self.prompts, self.call, rows)
        arguments |= fixed | {"num_inference_steps": num_inference_steps}
        seeds = [self.seed + i * self.pictures + n for i in rows for n in range(self.pictures)]
        # without the pipeline's own bar
        with torch.no_grad(), loop_bar(self.pipe), encode_once(self.pipe, self.batch_size):
            return self.pipe(generator=generators(seeds), **arguments)[0]

    def kept_base(self, num_inference_steps: int) -> BaseRun | None:
        """The plain run at this number of steps, where all of it has been kept."""
        kept = self.work.bases.get(num_inference_steps)
        return kept if kept is not None and kept.final is not None else None

    def new_base(self, num_inference_steps: int) -> BaseRun:
        """An empty plain run at this number of steps."""
        total = len(self.prompts) * self.pictures
        return BaseRun(num_inference_steps, total, self.folder)

    def pictures_of(self, prompts: Sequence[int]) -> list[int]:
        """The numbers of the pictures of some prompts."""
        return [i * self.pictures + n for i in prompts for n in range(self.pictures)]

    @property
    def fitted(self) -> list[int]:
        """The numbers of the prompts that rows are fitted to."""
        return [i for i in range(len(self.prompts)) if i not in self.held_out]

    def mixed(self, count: int) -> list[int]:
        """So many prompts at most, of which about a quarter are held out where any are."""
        apart = sorted(self.held_out)
        held = apart[: max(1, round(count / 4), count - len(self.fitted))]
        return sorted(self.fitted[: max(0, count - len(held))] + held)

    def fitted_among(self, prompts: Sequence[int]) -> list[int]:
        """The places, among the pictures of some prompts, of those that rows are fitted to."""
        own = enumerate(i for i in prompts for _ in range(self.pictures))
        return [place for place, i in own if i not in self.held_out]

    def rows(self, steps: int, prompts: int | None = None) -> int:
        """Rows of the denoiser that so many steps of each prompt are; of all prompts by default."""
        count = len(self.prompts) if prompts is None else prompts
        return steps * count * self.pictures * self.work.width

    @property
    def spent(self) -> float:
        """What the denoiser was run for so far, in plain generations; known after the first
        collection."""
        return self.work.rows / self.work.plain * len(self.prompts)

    def interrupted(self, metadata: dict[str, Any]) -> None:
        """Say, in the forecaster's metadata too, that it holds what was found so far."""
        metadata["interrupted"] = True
        self.progress.line("interrupted: the forecaster holds what was found so far")

    @contextmanager
    def phase(self, title: str, total: int, done: int = 0) -> Iterator[Bar]:
        """A phase of so much work, `done` of it before it begins, which moves as rows are computed;
        the unit is a row of the denoiser where `computed` is told no other."""
        with self.progress.bar(title, total, done) as bar:
            self.work.bar = bar
            try:
                yield bar
            finally:
                self.work.bar = None

    def controlled(self, controller: Controller) -> AbstractContextManager[None]:
        """Let ``controller`` decide every call of the denoisers; they are as before afterwards."""
        return controlled(self.models, controller, self.pipe)

    def fingerprint(self, num_inference_steps: int) -> str:
        """Short hash of everything but the prompts that statistics depend on."""
        fields = {**self.depends_on(), "steps": num_inference_steps}
        text = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def depends_on(self) -> dict[str, str]:
        """What the fingerprint is made of, by name, as short texts that can be compared."""
        config = getattr(self.pipe.scheduler, "config", {})
        levels = {name: value for name, value in config.items() if not name.startswith("_")}
        found = {**self.call, "tap": self.tap, "seed": self.seed, "scheduler config": levels}
        texts = {name: json.dumps(value, default=_digest) for name, value in found.items()}
        texts = {name: t if len(t) < 60 else _short_hash(t) for name, t in texts.items()}
        kinds = {"pipeline": type(self.pipe), "scheduler": type(self.pipe.scheduler)}
        texts |= {name: kind.__name__ for name, kind in kinds.items()}
        return {**texts, "weights": self._weights()}

    def _weights(self) -> str:
        return "+".join(map(weights_hash, self.models))

    def metadata(self) -> dict[str, Any]:
        """What a trained forecaster records of its origin."""
        return {
            "model_class": type(self.models[0]).__name__,
            "model_id": model_id(self.pipe),
            "model_hash": self._weights(),
            "scheduler": type(self.pipe.scheduler).__name__,
            "noise": adds_noise(self.pipe.scheduler, self.call),
            "prompts": len(self.prompts),
            "prompts_sha256": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest(),
            "seed": self.seed,
            "call": {k: v for k, v in self.call.items() if isinstance(v, (str, int, float))},
            "guidance": guidance_scales(call_defaults(self.pipe) | self.call, self.pipe),
            "guided": self.work.width > 1,
        }


def in_batches(rows: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """The rows, so many at a time."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def model_id(pipe: Any) -> str:
    """What a pipeline is called: its Hub id, or the name of its folder without the way there."""
    source = str(getattr(pipe, "name_or_path", "") or "").rstrip("/\\")
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots\b", source)
    if cached:
        return "/".join(cached.groups())
    if is_hub_id(source):
        return source
    return re.split(r"[/\\]", source)[-1]


def call_defaults(pipe: Any) -> dict[str, Any]:
    """The arguments of ``pipe(...)`` that have a value if none is given."""
    known = inspect.signature(type(pipe).__call__).parameters.values()
    return {each.name: each.default for each in known if each.default is not each.empty}


def pipeline_arguments(pipe: Any) -> tuple[str, ...]:
    """Names of the arguments that ``pipe(...)`` takes."""
    return tuple(inspect.signature(type(pipe).__call__).parameters)


def call_arguments(pipe: Any, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword arguments into those that ``pipe(...)`` takes and the others."""
    known = pipeline_arguments(pipe)
    taken = {name: value for name, value in given.items() if name in known}
    return taken, {name: value for name, value in given.items() if name not in known}


def followed(denoiser: Denoiser, kwargs: dict[str, Any]) -> Step:
    """The step of a training run's call; LesaError where the clock cannot be sure of it."""
    step = denoiser.clock.tick(kwargs)
    problem = step.problem or step.generation.levels_problem
    if problem is not None:
        pipe = next(iter(denoiser.clock.pipes), None)
        remedy = advice(pipe) or "train with the pipeline's own loop, one thread at a time"
        raise LesaError(
            f"scheduler={type(getattr(pipe, 'scheduler', None)).__name__}: step {step.index} "
            f"cannot be followed ({problem}); {remedy}"
        )
    return step


def sample_of(denoiser: Denoiser, output: Any, latent: Any) -> torch.Tensor | None:
    """What a call returns for the sampler; None where that is no single tensor."""
    sample = read_sample(output)
    return None if sample is None else sampled(denoiser, sample, latent)


def sampled(denoiser: Denoiser, sample: torch.Tensor, latent: Any) -> torch.Tensor:
    """The part of a sample that the sampler uses: without a learned variance, unless the scheduler
    is one that uses it too; itself where that is all of it."""
    pipe = next(iter(denoiser.clock.pipes), None)
    config = getattr(getattr(pipe, "scheduler", None), "config", {})
    learned = str(config.get("variance_type")).startswith("learned")
    return sample if learned else without_variance(sample, latent)


def parts_of(rows: int, pictures: int) -> int:
    """How often a call of the denoiser holds every picture: 2 with batched guidance.

    Raises LesaError where the rows do not divide.
    """
    parts, left = divmod(rows, pictures)
    if left or not parts:
        raise LesaError(
            f"call: the denoiser got {rows} rows for {pictures} pictures; train with one in which "
            "every picture has the same number of rows"
        )
    return parts


def _digest(value: Any) -> str:
    """What a setting that is no plain value is known by: a tensor by its content."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return hashlib.sha256(value.detach().cpu().double().numpy().tobytes()).hexdigest()


def _short_hash(text: str) -> str:
    return f"one of sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
