"""Two blocks in place of all of a model's: its first and its last, over what lay between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lesa.errors import LesaError
from lesa.hooks.alone import (
    argument_names,
    blocks_of,
    check_two_blocks,
    check_weights,
    feature_width,
)
from lesa.hooks.model_specs import model_spec
from lesa.hooks.plain_copy import plain_copy
from lesa.hooks.wrappers import core_of

__all__ = ["Bridge", "Noted", "TwoBlocks"]

STREAMS = ("hidden_states", "encoder_hidden_states")  # what blocks hand on, by their own names
Bridge = Mapping[str, Tensor]


class TwoBlocks(nn.Module):
    """The model's first and last block, trained to give what all blocks would.

        u = first(x_s, ...),  h = last(u + c + join([u, c]), ...)

    c [B, L, C] is the *bridge*: what the blocks between the two added at the last full step, for
    the text stream too where there is one. Both begin as copies of the model's, `join` (2C -> C) as
    0: untrained it keeps the middle of the model and runs its ends on the current latent, and in
    the state of the full step itself it gives the model's own output. The embedders, the last norm
    and the projection stay the model's, and its forward is run as it is, with the two in the place
    of its block containers: they get whatever conditions the model's blocks.
    Source: two blocks on the current latent and the cached feature: DisCa (arXiv 2602.05449). Which
    blocks they begin as, and the bridge between them, are not published there and decided here.

    Args:
        model: the denoiser.
        weights: what it has learned, as its state dict.

    Raises:
        LesaError: the blocks of this class cannot run alone, or are others than the weights', or
            there is nothing to begin with, since the model's own weights are offloaded.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        core = core_of(model)
        check_two_blocks(core)
        first, *_, last = blocks_of(core)
        if weights is None and any(
            part.is_meta for part in (*first.parameters(), *last.parameters())
        ):
            raise LesaError(
                f"model: the weights of this {type(core).__name__} are offloaded part by part; "
                "train with enable_model_cpu_offload, or on a device that holds it"
            )
        self.first, self.last = plain_copy(first), plain_copy(last)
        like = next(self.last.parameters())
        self.join = nn.Linear(2 * (width := feature_width(core)), width, dtype=like.dtype)
        with torch.no_grad():
            self.join.weight.zero_()
            self.join.bias.zero_()
        self.to(like.device).eval()
        if weights is not None:
            check_weights(core, weights)
            self.load_state_dict(weights)
        self._bridge: Bridge = {}
        self._dtype: torch.dtype | None = None
        self.first.register_forward_pre_hook(self._enter, with_kwargs=True)
        self.last.register_forward_pre_hook(self._cross, with_kwargs=True)
        for block in (self.first, self.last):
            block.register_forward_hook(self._leave)

    def bridge(self, model: nn.Module, noted: Noted, run: Callable[[], Any]) -> Bridge:
        """The bridge of a full step that was noted; `run` calls the model as that step did.

        What the last block would get right behind the first one is asked of the model's own forward
        with both blocks' outputs given: embedders and tail run, no block does.

        Raises:
            LesaError: the blocks were not noted, as those that are compiled.
        """
        if "into" not in noted:
            raise LesaError(
                f"model: the blocks of {type(model).__name__} do not show what they get; leave "
                "them uncompiled"
            )
        blocks = blocks_of(model)
        first = _Given(blocks[0], noted["out"])
        last = _Given(blocks[-1], noted["result"])
        with _in_place_of_blocks(model, first, last):
            run()
        into, behind = noted["into"], last.got
        return {name: part - behind[name] for name, part in into.items()}

    @contextmanager
    def in_place_of_blocks(self, model: nn.Module, bridge: Bridge) -> Iterator[None]:
        """The model runs these two instead of all its blocks for a while."""
        self._bridge = bridge
        try:
            with _in_place_of_blocks(model, self.first, self.last):
                yield
        finally:
            self._bridge = {}

    def _enter(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """In the dtype of the block, which may be trained in a wider one than the model has."""
        self._dtype = _named(block, args, kwargs)["hidden_states"].dtype
        own = self.join.weight.dtype
        return tree_map(lambda part: _cast(part, self._dtype, own), (args, kwargs))

    def _cross(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """From the first block's output to the last one's input."""
        args, kwargs = self._enter(block, args, kwargs)
        named, own = _named(block, args, kwargs), self.join.weight.dtype
        ends = {name: part.to(own) for name, part in self._bridge.items() if name in named}
        for name, part in ends.items():
            both = torch.cat([named[name], part], -1) if name == "hidden_states" else None
            named[name] = named[name] + part
            if both is not None:
                named[name] = named[name] + self.join(both)
        return (), named

    def _leave(self, _: nn.Module, __: Any, output: Any) -> Any:
        own = self.join.weight.dtype
        return tree_map(lambda part: _cast(part, own, self._dtype), output)


class Noted(dict[str, Any]):
    """What a full step showed: `out` of the first block, `into` (by name) and `result` of the
    last."""

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Note a run of the model."""
        first, *_, last = blocks_of(model)

        def into(block: nn.Module, args: Any, kwargs: Any) -> None:
            named = _named(block, args, kwargs)
            streams = {name: named.get(name) for name in STREAMS}
            self["into"] = {name: s for name, s in streams.items() if isinstance(s, Tensor)}

        handles = [
            first.register_forward_hook(lambda _, __, out: self.__setitem__("out", out)),
            last.register_forward_pre_hook(into, with_kwargs=True),
            last.register_forward_hook(lambda _, __, out: self.__setitem__("result", out)),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Given(nn.Module):
    """Stands for a block whose output is known; notes what it gets."""

    def __init__(self, block: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__["stands_for"] = block  # no part of this one
        self.output = output
        self.got: dict[str, Any] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.got = _named(self.stands_for, args, kwargs)
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stands_for"], name)


def _named(block: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    return {**dict(zip(argument_names(block), args, strict=False)), **kwargs}


def _cast(part: Any, from_dtype: torch.dtype | None, to_dtype: torch.dtype | None) -> Any:
    alike = isinstance(part, Tensor) and part.dtype == from_dtype
    return part.to(to_dtype) if alike else part


@contextmanager
def _in_place_of_blocks(model: nn.Module, first: nn.Module, last: nn.Module) -> Iterator[None]:
    """These two are all that the model's containers hold for a while."""
    names = model_spec(model).blocks
    before = {name: model._modules[name] for name in names}
    lists = {name: nn.ModuleList() for name in names}
    lists[names[0]].append(first)
    lists[names[-1]].append(last)
    model._modules |= lists
    try:
        yield
    finally:
        model._modules |= before
