"""`lesa train --dry-run`: what a training would take, from configurations alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lesa.errors import LesaError
from lesa.training.budget import Budget
from lesa.training.work import HELD
from lesa.util.progress import clock

if TYPE_CHECKING:
    from lesa.cli.meta_run import Measured
    from lesa.cli.recipe import Recipe

__all__ = ["Cost", "Memory", "Plan", "check_fits", "cost_of", "memory_of"]

HISTORY = 3  # cached features of a forecaster that is told nothing else


@dataclass(frozen=True)
class Cost:
    """What the denoiser computes in a training, at most.

    Attributes:
        generations: plain generations of one prompt, at all numbers of steps; None for a budget of
            seconds where it is not known how long a step takes.
        full_steps: full steps of one prompt that they are.
        seconds: where it is known how long a step takes, or how much time there is.
        rows, flops: of the denoiser over all guidance branches, where its model is known.
    """

    generations: float | None
    full_steps: float | None
    seconds: float | None
    rows: float | None = None
    flops: float | None = None

    def of_model(self, found: Measured) -> Cost:
        """With the rows and operations of a model."""
        if self.full_steps is None:
            return self
        flops = None if found.flops is None else self.full_steps * found.flops
        return replace(self, rows=self.full_steps * found.rows, flops=flops)


@dataclass(frozen=True)
class Memory:
    """Bytes that a training takes beside activations.

    Attributes:
        denoisers: of the weights of each.
        others: of the weights of text encoders and autoencoder.
        picture: on the device, of a picture of one accelerated run that is trained.
        plain_run: on the host, of the plain run that is kept.
    """

    denoisers: tuple[int, ...]
    others: int
    picture: int
    plain_run: int

    def resident(self, offload: str) -> int:
        """Weights that are on the device at once, at least."""
        weights = (*self.denoisers, self.others)
        return {"none": sum(weights), "model": max(weights), "sequential": 0}[offload]


@dataclass(frozen=True)
class Plan:
    """A training as it would run."""

    title: str
    licence: str
    pipeline: str
    dtype: str
    call: Mapping[str, Any]
    num_inference_steps: Sequence[int]
    full_steps: Sequence[int]
    prompts: int
    judging: int
    batch_size: int
    preparation: Mapping[str, Any]
    cost: Cost
    parameters: int | None = None
    branches: int | None = None
    memory: Memory | None = None
    notes: list[str] = field(default_factory=list)

    def lines(self) -> dict[str, str]:
        """The plan in words, by what each line is about."""
        size = " x ".join(str(self.call[n]) for n in ("width", "height") if self.call.get(n))
        frames = f", {self.call['num_frames']} frames" if self.call.get("num_frames") else ""
        listed = {name: ", ".join(map(str, numbers)) for name, numbers in (
            ("steps", self.num_inference_steps), ("full", self.full_steps)
        )}  # fmt: skip
        found = {
            "pipeline": " - ".join(filter(None, (self.title, self.pipeline))),
            "licence": self.licence,
            "call": f"{size or 'default size'}{frames}, {listed['steps']} steps, {self.dtype}",
            "full steps": listed["full"],
            "prompts": f"{self.prompts}, {self.judging} of them judge, {self.batch_size} at a time",
            "made ready": ", ".join(f"{k}={v}" for k, v in self.preparation.items()),
            "cost": self._cost(),
            "seconds": "" if self.cost.seconds is None else f"at most {clock(self.cost.seconds)}",
            **({} if self.memory is None else self._memory(self.memory)),
            "not known": "; ".join(self.notes),
        }
        return {name: text for name, text in found.items() if text}

    def _cost(self) -> str:
        cost = self.cost
        if cost.generations is None or cost.full_steps is None:
            return ""
        told = (
            f"at most {cost.generations:.0f} plain generations = {cost.full_steps:.0f} full steps"
        )
        told += "" if cost.rows is None else f" = {cost.rows:.0f} rows"
        return told + ("" if cost.flops is None else f" = {cost.flops / 1e15:.4g} PFLOP")

    def _memory(self, memory: Memory) -> dict[str, str]:
        names = [gigabytes(size) for size in memory.denoisers]
        resident = memory.resident(self.preparation.get("offload", "none"))
        others = f", text encoders and autoencoder {gigabytes(memory.others)}"
        return {
            "weights": f"denoiser {' + '.join(names)}{others * bool(memory.others)}",
            "on the device": f"{gigabytes(resident)} of weights, {gigabytes(memory.picture)} a"
            " picture of every run that is trained, and activations",
            "on the host": f"{gigabytes(memory.plain_run)} of plain runs",
        }


def cost_of(
    given: Budget,
    step_seconds: float | None,
    steps: Sequence[int],
    full_steps: Sequence[int],
    prompts: int,
    judging: int,
) -> Cost:
    """What training may compute, as it would be told after its first batch.

    step_seconds: of one full step of one prompt, over all guidance branches.

    Raises: LesaError for time that does not pay for the least.
    """
    each = None if step_seconds is None else step_seconds * sum(steps)
    if given.seconds is not None and each is None:
        return Cost(None, None, given.seconds)
    if each is not None:
        given = given.known(each, prompts, judging, full_steps, steps[0])
    generations = given.whole(prompts, full_steps, steps[0])
    seconds = None if each is None else each * generations
    return Cost(generations, generations * sum(steps), seconds)


def memory_of(recipe: Recipe, found: Measured, pictures: int, steps: Sequence[int]) -> Memory:
    """What the weights, the runs that are trained and the plain runs of so many pictures take."""
    assert recipe.model is not None
    width = found.dtype.itemsize
    rows = found.rows * (found.argument_bytes + (HISTORY + HELD) * found.feature_bytes)
    return Memory(
        (found.parameters * width,) * recipe.model.denoisers,
        int(recipe.model.other_parameters * width),
        rows,
        (found.latent_bytes + found.output_bytes) * sum(steps) * pictures,
    )


def check_fits(
    told: str, memory: Memory, batch_size: int, offload: str, limit: int, device: str
) -> None:
    """LesaError where the weights and a batch of pictures are more than a device has.

    told, device: the name of the recipe and of the device, for the message.
    """
    weights, pictures = memory.resident(offload), batch_size * memory.picture
    if weights + pictures <= limit:
        return
    more = {"none": "model", "model": "sequential"}.get(offload) if device != "cpu" else None
    remedies = [f"set offload: {more} under memory"] * bool(more and weights > limit / 2)
    remedies += ["lower batch-size"] * (batch_size > 1 and pictures > limit / 2)
    raise LesaError(
        f"{told}: {gigabytes(weights)} of weights and {gigabytes(pictures)} for {batch_size}"
        f" pictures at a time do not fit into the {gigabytes(limit)} of {device};"
        f" {' or '.join([*remedies, 'take a larger device'])}"
    )


def gigabytes(size: float) -> str:
    """23.8e9 -> "23.8 GB", 52e6 -> "52 MB"."""
    for unit, number in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= number:
            return f"{size / number:.3g} {unit}"
    return f"{size:.0f} B"
