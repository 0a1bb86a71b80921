"""What must not change while features are cached: whether it is the same, and still alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from lesa.hooks.denoiser import Call

__all__ = ["Conditioning"]

_NUMBERS = (int, float, str)


class Conditioning:
    """What the features of one trajectory come from besides time, held weakly.

    Args:
        call: the first call of the trajectory.
        num_steps: how many steps the generation has by the trajectory's table.
        ended: called with a dead weak reference, at any moment and in any thread, when a tensor is
            gone without which no later call can continue the trajectory: its loop is over.
    """

    def __init__(self, call: Call, num_steps: int, ended: Callable[[Any], None]) -> None:
        self._num_steps, self._ended = num_steps, ended
        self._latent = _layout(call.argument(call.denoiser.spec.latent))
        self._return_dict = call.argument("return_dict")
        self._states = {call.denoiser: call.denoiser.state}
        self._kinds = _kinds(call)
        self._known = [_Known(self._held(value), _version(value)) for _, value in _parts(call)]
        # Prompt embeddings may be the user's, who keeps them; positions are made by the pipeline.
        self._places = [weakref.ref(place) for place in _places(call)]
        self._watched: list[weakref.ref[Tensor]] = []

    def change(self, call: Call) -> str | None:
        """What is not as at the first call, if anything."""
        if call.step.num_steps != self._num_steps:
            return "number of steps changed"
        if _layout(call.argument(call.denoiser.spec.latent)) != self._latent:
            return "latent changed in shape, dtype or device"
        if call.argument("return_dict") is not self._return_dict:
            return "return_dict changed"
        state = call.denoiser.state
        if self._states.setdefault(call.denoiser, state) != state:  # a pipeline may have two
            return "adapters, attention processors or the ControlNet's scale changed"
        if _kinds(call) != self._kinds:
            return "an argument appeared or vanished"
        for (name, value), known in zip(_parts(call), self._known, strict=False):
            if not known.is_still(value):
                return f"{name} changed"
        if self._places:
            self._watch_places(call)
        return None

    def _held(self, value: Any) -> Any:
        return weakref.ref(value, self._ended) if isinstance(value, Tensor) else value

    def _watch_places(self, call: Call) -> None:
        """At the second call: position tensors that both got live as long as the loop does."""
        known = [place() for place in self._places]
        both = [place for place in _places(call) if any(place is other for other in known)]
        self._places, self._watched = [], [weakref.ref(place, self._ended) for place in both]


def _layout(latent: Any) -> tuple[Any, ...]:
    if isinstance(latent, Tensor):
        return latent.shape, latent.dtype, latent.device
    return tuple(_layout(part) for part in latent or ())


def _kinds(call: Call) -> tuple[type, ...]:
    """Tells which arguments there are: None has a type of its own."""
    return tuple(map(type, call.kwargs.values()))


def _places(call: Call) -> list[Tensor]:
    values = [call.argument(name) for name in call.denoiser.spec.unbatched]
    return [value for value in values if isinstance(value, Tensor)]


def _parts(call: Call) -> list[tuple[str, Any]]:
    """The arguments that stay the same at every step, and the parts of those that are dicts."""
    parts = [(name, call.argument(name)) for name in call.denoiser.spec.conditioning]
    for name, value in call.kwargs.items():
        if value.__class__ is dict:  # image embeddings, time ids, LoRA scales
            for key, part in value.items():
                for item in part if part.__class__ is list else (part,):
                    parts.append((f"{name}[{key!r}]", item))
    return parts


def _version(value: Any) -> int:
    """Counts in-place writes; inference tensors have no such counter."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


class _Known(NamedTuple):
    """A conditioning argument at the first call: a tensor by a weak reference and its version."""

    held: Any
    version: int

    def is_still(self, value: Any) -> bool:
        """Whether `value` is the same object, unwritten, or an equal number."""
        if isinstance(value, Tensor):
            held = self.held
            same = held.__class__ is weakref.ref and held() is value
            return same and (value.is_inference() or value._version == self.version)
        return value is self.held or (value.__class__ in _NUMBERS and value == self.held)
