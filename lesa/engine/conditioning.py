"""What must not change while features are cached: whether it is the same, and still alive."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lesa.hooks.denoiser import Call

__all__ = ["Conditioning"]

_NUMBERS = (int, float, str)
# Arguments that are made anew at every step: their tensors tell nothing by being other ones.
_MOVING = re.compile(
    r"residual|control|block_samples|time|latent|noise|sample|cache|_tokens"
    r"|(?<!encoder)(?:_|^)hidden_states"
)


class Conditioning:
    """What the features of one trajectory come from besides time, held weakly.

    Watched are the arguments that the model's row names, and tensors and numbers inside of dicts,
    and of lists and tuples with tensors in them, nested or not, whatever the argument. A tensor is
    known by what it is, which costs nothing. Some pipelines make the same one anew at every step
    (AceStep, the first latent diffusion): where another tensor has come once, what later
    trajectories get there is held, and another one of equal values is the same.

    Args:
        call: the first call of the trajectory.
        num_steps: how many steps the generation has by the trajectory's table.
        remade: the places where another tensor has come once; `change` adds to them.
        ended: called with a dead weak reference, at any moment and in any thread, when a tensor is
            gone without which no later call can continue the trajectory: its loop is over.
    """

    def __init__(
        self, call: Call, num_steps: int, remade: set[str], ended: Callable[[Any], None]
    ) -> None:
        self._num_steps, self._remade, self._ended = num_steps, remade, ended
        self._latent = _layout(call.argument(call.denoiser.spec.latent))
        self._return_dict = call.argument("return_dict")
        self._states = {call.denoiser: call.denoiser.state}
        self._kinds = _kinds(call)
        self._single: list[tuple[str, _Known]] = []
        self._nested: list[tuple[str, list[_Known]]] = []
        for name in _watched(call):
            value = call.argument(name)
            if isinstance(value, (dict, list, tuple)):
                leaves = _leaves(name, value)
                self._nested.append((name, [self._known(*leaf, call.part) for leaf in leaves]))
            else:
                self._single.append((name, self._known(name, value, call.part)))
        # Prompt embeddings may be the user's, who keeps them; positions are made by the pipeline.
        # A part of a batch is not kept by anybody.
        self._places = [] if call.part else [weakref.ref(place) for place in _places(call)]
        self._watched: list[weakref.ref[Tensor]] = []

    def fits(self, latent: Any) -> bool:
        """Whether a latent is laid out as the first one."""
        return _layout(latent) == self._latent

    def change(self, call: Call) -> str | None:
        """What is not as at the first call, if anything. Of a part of a batch, which is put
        together anew at every step, tensors are not asked which ones they are."""
        if call.step.num_steps != self._num_steps:
            return "number of steps changed"
        latent = call.argument(call.denoiser.spec.latent)
        layout = _layout(latent)
        if layout != self._latent and not self._is_cast(latent, layout):
            return "latent changed in shape, dtype or device"
        if call.argument("return_dict") is not self._return_dict:
            return "return_dict changed"
        state = call.denoiser.state
        if self._states.setdefault(call.denoiser, state) != state:  # a pipeline may have two
            return "adapters, attention processors or the ControlNet's scale changed"
        if _kinds(call) != self._kinds:
            return "an argument appeared or vanished"
        return self._change_inside(call)

    def _change_inside(self, call: Call) -> str | None:
        """Which argument is another one than at the first call."""
        for name, known in self._single:
            if not known.is_still(call.argument(name), call.part):
                return self._changed(name, call)
        for name, knowns in self._nested:
            leaves = _leaves(name, call.argument(name))
            for (label, leaf), known in zip(leaves, knowns, strict=False):
                if not known.is_still(leaf, call.part):
                    return self._changed(label, call)
            if len(leaves) != len(knowns):
                return f"{name} changed in length"
        if self._places:
            self._watch_places(call)
        return None

    def _known(self, label: str, value: Any, part: bool) -> _Known:
        held = value
        if isinstance(value, Tensor):
            if part:
                held = _kind(value)
            elif label not in self._remade:
                held = weakref.ref(value, self._ended)
        return _Known(held, _version(value))

    def _changed(self, label: str, call: Call) -> str:
        """The reason; where other tensors have come is remembered, in all places at once."""
        for name, knowns in (*[(name, [known]) for name, known in self._single], *self._nested):
            leaves = _leaves(name, call.argument(name))
            for (place, leaf), known in zip(leaves, knowns, strict=False):
                if isinstance(leaf, Tensor) and not known.is_still(leaf, call.part):
                    self._remade.add(place)
        return f"{label} changed"

    def _is_cast(self, latent: Any, layout: tuple[Any, ...]) -> bool:
        """Whether the latent changed in its dtype alone, by autocast, and so did the scheduler's
        next one; from now on it is the one to expect."""
        first = next(iter(_leaves("", latent)), ("", None))[1]
        cast = (
            isinstance(first, Tensor)
            and torch.is_autocast_enabled(first.device.type)
            and _without_dtypes(layout) == _without_dtypes(self._latent)
        )
        if cast:
            self._latent = layout
        return cast

    def _watch_places(self, call: Call) -> None:
        """At the second call: position tensors that both got live as long as the loop does."""
        known = [place() for place in self._places]
        both = [place for place in _places(call) if any(place is other for other in known)]
        self._places, self._watched = [], [weakref.ref(place, self._ended) for place in both]


def _layout(latent: Any) -> tuple[Any, ...]:
    if isinstance(latent, Tensor):
        return latent.shape, latent.dtype, latent.device
    return tuple(_layout(part) for part in latent or ())


def _without_dtypes(layout: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        _without_dtypes(part) if type(part) is tuple else part
        for part in layout
        if not isinstance(part, torch.dtype)
    )


def _kinds(call: Call) -> tuple[type, ...]:
    """Tells which arguments there are: None has a type of its own."""
    return tuple(map(type, call.kwargs.values()))


def _places(call: Call) -> list[Tensor]:
    values = [call.argument(name) for name in call.denoiser.spec.unbatched]
    return [value for value in values if isinstance(value, Tensor)]


def _watched(call: Call) -> Iterator[str]:
    """The arguments that stay the same at every step: those of the row, and all that hold
    others."""
    spec = call.denoiser.spec
    yield from spec.conditioning
    given = [*zip(call.denoiser.names, call.args, strict=False), *call.kwargs.items()]
    for name, value in given:
        if name in (spec.latent, *spec.conditioning) or _MOVING.search(name):
            continue
        if isinstance(value, dict) or (
            isinstance(value, (list, tuple))
            and any(isinstance(leaf, Tensor) for _, leaf in _leaves("", value))
        ):
            yield name


def _leaves(label: str, value: Any) -> list[tuple[str, Any]]:
    """What a value holds in dicts, lists and tuples, nested or not, each with the name of its
    place."""
    if isinstance(value, dict):  # image embeddings, time ids, LoRA scales
        parts = [(f"{label}[{key!r}]", part) for key, part in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [(label, part) for part in value]
    else:
        return [(label, value)]
    return [leaf for part in parts for leaf in _leaves(*part)]


def _version(value: Any) -> int:
    """Counts in-place writes; inference tensors have no such counter."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _is_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values; on a device this waits for it."""
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


class _Kind(NamedTuple):
    """What is known of a tensor of which only a part was given. Not its shape: where a prompt is
    padded to the longest one in its batch, that changes with the batch."""

    ndim: int
    dtype: torch.dtype
    device: torch.device


class _Known(NamedTuple):
    """A conditioning argument at the first call: a tensor by a weak reference and its version, or
    itself and its version where others of equal values may come; by its kind alone in a part of a
    batch."""

    held: Any
    version: int

    def is_still(self, value: Any, part: bool = False) -> bool:
        """Whether `value` is the same object, unwritten, or an equal number; an equal tensor where
        the first one is held; any tensor of the same kind in a part of a batch."""
        if isinstance(value, Tensor):
            held = self.held
            if part or held.__class__ is _Kind:
                return self._is_alike(value)
            if isinstance(held, Tensor) and held is not value:
                return _version(held) == self.version and _is_equal(held, value)
            same = held is value or (held.__class__ is weakref.ref and held() is value)
            return same and (value.is_inference() or value._version == self.version)
        return value is self.held or (value.__class__ in _NUMBERS and value == self.held)

    def _is_alike(self, value: Tensor) -> bool:
        """Whether a tensor is of the first one's kind, as far as that is still known."""
        held = self.held() if self.held.__class__ is weakref.ref else self.held
        if isinstance(held, Tensor):
            held = _kind(held)
        return held is None or held == _kind(value)


def _kind(value: Tensor) -> _Kind:
    return _Kind(value.ndim, value.dtype, value.device)
