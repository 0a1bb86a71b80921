"""The row of a denoiser class: where it keeps its blocks, its tail and its latent."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, fields
from typing import get_args

from torch import nn

from lesa.core.checks import shown
from lesa.core.forecaster import Tap
from lesa.errors import LesaError
from lesa.hooks.class_swap import Identity, OnlyLast, Skippable

__all__ = ["ModelSpec"]


@dataclass(frozen=True)
class ModelSpec:
    """Where a denoiser class keeps its blocks, its tail and its latent: its row.

    A class whose forward ends in `proj_out(norm_out(h, temb))`, after a loop over `self.stages`:

        lesa.register_model(lesa.ModelSpec("MyTransformer", blocks=("stages",)))

    The output tap needs the arguments alone, which are found for a class without a row:

        lesa.register_model(lesa.ModelSpec("MyDenoiser", latent="x", taps=("output",)))

    Attributes:
        name: name of the class.
        blocks: the `ModuleList`s that a skipped step does not run; the forward may only iterate.
        tail: the module after the blocks; the *hidden* feature is its first argument. "" for a row
            with the output tap alone.
        latent: the argument of the forward that holds the current latent.
        conditioning: the arguments whose identity tells a changed prompt.
        unbatched: arguments without a batch dimension.
        stateful: arguments that, where they are given, make a call leave something behind which a
            skipped step would not: such calls are computed in full.
        identities: modules that a skipped step passes through.
        last: the `ModuleList`s of which a skipped step runs the last module only.
        joined: the module whose output is concatenated behind the feature, along the channels.
        zeroed: arguments that are 0 on a skipped step where they are given.
        embedding: the module that turns (time, ...) into what modulates `tail`, for models that
            return `proj_out(tail(h, embedding(...)))` as it is.
        upcast: whether the tail gets an fp32 copy of a narrower feature.
        taps: where a feature can be taken, the best one first.
        notes: what a reader of the table should know.

    Raises:
        LesaError: a field of names is a text or holds something else, or a tap is unknown.
    """

    name: str
    blocks: tuple[str, ...] = ()
    tail: str = "norm_out"
    latent: str = "hidden_states"
    conditioning: tuple[str, ...] = ("encoder_hidden_states",)
    unbatched: tuple[str, ...] = ()
    stateful: tuple[str, ...] = ()
    identities: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    joined: str = ""
    zeroed: tuple[str, ...] = ()
    embedding: str = ""
    upcast: bool = False
    taps: tuple[Tap, ...] = ("output", "hidden")
    notes: str = ""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(each.default, tuple) and not _are_names(value):
                raise LesaError(
                    f"ModelSpec.{each.name}={shown(value)}: not a tuple of names; give one, as "
                    f"{each.default or ('name',)}"
                )
        if not self.taps or not set(self.taps) <= set(get_args(Tap)):
            known = " or ".join(map(repr, get_args(Tap)))
            raise LesaError(f"ModelSpec.taps={shown(self.taps)}: unknown; give {known}, or both")
        if "hidden" not in self.taps:
            object.__setattr__(self, "tail", "")

    def check(self, core: nn.Module) -> None:
        """LesaError where the model lacks a part that the row names."""
        paths = (*self.blocks, *self.identities, self.tail, self.joined, self.embedding)
        for path in filter(None, paths):
            try:
                self.module(core, path)
            except (AttributeError, IndexError):
                raise LesaError(
                    f"model: this {type(core).__name__} has no {path!r}, which its row names; "
                    "correct the row with lesa.register_model"
                ) from None

    def module(self, core: nn.Module, path: str) -> nn.Module:
        """A part of the denoiser by its path, in which -1 stands for the last of a list."""
        part = core
        for name in path.split("."):
            part = list(part.children())[-1] if name == "-1" else part.get_submodule(name)
        return part

    def swapped(self, core: nn.Module) -> dict[type, list[nn.Module]]:
        """The parts whose class is swapped, by what they become; inner ones come first."""
        last = []
        for path in self.last[::-1]:
            with suppress(AttributeError):  # a U-Net whose last block has no attention
                last.append(self.module(core, path))
        paths = {Skippable: self.blocks, Identity: self.identities}
        found: dict[type, list[nn.Module]] = {OnlyLast: last}
        return found | {mixin: [self.module(core, p) for p in paths[mixin]] for mixin in paths}


def _are_names(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)
