"""A pipeline that is known by its configurations alone, as the `model` of a recipe holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lesa.cli.config_fields import check_fields
from lesa.cli.names import did_you_mean
from lesa.cli.recipe_values import (
    as_name,
    as_number,
    as_settings,
    as_shape,
    as_text,
    as_whole,
    known,
)
from lesa.errors import LesaError

if TYPE_CHECKING:
    from lesa.cli.saved import Saved

__all__ = ["Published"]


@dataclass(frozen=True)
class Published:
    """Classes of diffusers with their configurations, and the shapes of a prompt's embeddings.

    Attributes:
        told: how messages begin, with the recipe's name.
        pipeline, denoiser: names of classes of diffusers.
        config: of the denoiser, where it differs from the class's defaults.
        denoisers: how many of them there are, one after the other in a run: 2 in Wan 2.2.
        scheduler, scheduler_config: class and configuration.
        text: argument of the pipeline -> shape of what encoders make of a prompt, without batch.
        parts: further parts that the pipeline asks for when it is made, class by name.
        parts_config: their configurations.
        arguments: further arguments of the pipeline's class.
        other_parameters: of text encoders and the autoencoder, which nothing is built of.
        source: where all this stands.
    """

    told: str
    pipeline: str
    denoiser: str
    config: Mapping[str, Any] = field(default_factory=dict)
    denoisers: int = 1
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    parts_config: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    other_parameters: float = 0.0
    source: str = ""

    @classmethod
    def read(cls, told: str, values: Mapping[str, Any]) -> Published:
        """From the mapping `model` of a recipe; LesaError for an unknown or missing name, or a
        wrong type."""
        found = known(told, "model", values, _KINDS)
        for name in ("pipeline", "denoiser"):
            if name not in found:
                raise LesaError(f"{told}: model has no {name}; give the name of diffusers' class")
        return cls(told, **found)

    def kind(self, name: str) -> Any:
        """A class of diffusers; LesaError where this diffusers has none of that name."""
        import diffusers

        if name.startswith("_") or not isinstance(found := getattr(diffusers, name, None), type):
            near = did_you_mean(name, [n for n in dir(diffusers) if n[0].isupper()])
            raise LesaError(
                f"{self.told}: model: diffusers {diffusers.__version__} has no class {name}{near};"
                " correct the name, or install another diffusers"
            )
        return found

    def check_fields(self) -> None:
        """LesaError for a field of a configuration that its class does not take."""
        kinds = {"config": self.denoiser, "scheduler-config": self.scheduler}
        values = {"config": self.config, "scheduler-config": self.scheduler_config}
        for part, config in self.parts_config.items():
            if part not in self.parts:
                raise LesaError(
                    f"{self.told}: model.parts-config.{part}: parts has no {part}; name its class"
                    " there, or leave this out"
                )
            kinds[f"parts-config.{part}"], values[f"parts-config.{part}"] = self.parts[part], config
        for key, name in kinds.items():
            check_fields(self.told, f"model.{key}", self.kind(name), values[key])
        check_fields(self.told, "model.arguments", self.kind(self.pipeline), self.arguments)

    def saved(self, name: str) -> Saved:
        """What a pipeline of this model is, in the place of one that does not lie here."""
        from lesa.cli.saved import Saved

        scheduler = {**self.scheduler_config, "_class_name": self.scheduler}
        return Saved(name, None, self.kind(self.pipeline), self.denoiser, scheduler)

    def check(self, kind: type | None, denoiser: str | None) -> None:
        """LesaError where the pipeline that is there is of another class; None is any."""
        named = None if kind is None else kind.__name__
        for name, wanted, there in (
            ("pipeline", self.pipeline, named),
            ("denoiser", self.denoiser, denoiser),
        ):
            if there not in (None, wanted):
                raise LesaError(
                    f"{self.told}: model.{name}={wanted!r}: the one that is given is"
                    f" {there}; give a recipe for that class, or another pipeline"
                )


def _texts(value: Any) -> dict[str, str]:
    return {name: as_text(text) for name, text in as_settings(value).items()}


def _one_or_two(value: Any) -> int:
    if as_whole(value) not in (1, 2):
        raise ValueError("1 or 2; a pipeline has one denoiser, or one after the other")
    return int(value)


def _not_below_zero(value: Any) -> float:
    if as_number(value) < 0:
        raise ValueError("a number of weights; give 0 or more")
    return float(value)


def _nested(value: Any) -> dict[str, Any]:
    return {name: as_settings(inner) for name, inner in as_settings(value).items()}


def _shapes(value: Any) -> dict[str, tuple[int, ...]]:
    as_settings(value)
    return {name: as_shape(shape) for name, shape in value.items()}


_KINDS = {
    "pipeline": as_name,
    "denoiser": as_name,
    "config": as_settings,
    "denoisers": _one_or_two,
    "scheduler": as_name,
    "scheduler_config": as_settings,
    "text": _shapes,
    "parts": _texts,
    "parts_config": _nested,
    "arguments": as_settings,
    "other_parameters": _not_below_zero,
    "source": as_text,
}
