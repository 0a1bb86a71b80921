"""The ControlNets beside a denoiser: what its features depend on, and no argument of its call."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from lesa.hooks.class_swap import ControlListener
from lesa.hooks.pipeline_state import control_parts, control_scale, controls_of

__all__ = ["Controls"]


class Controls:
    """The ControlNets of the pipelines that use a denoiser, and their scales."""

    def __init__(self) -> None:
        self._listeners: list[ControlListener] = []
        self._known: tuple[Any, dict[str, int]] = lambda: None, {}

    @property
    def state(self) -> tuple[Any, ...]:
        """Whether they are other ones than those seen last, and their scales; compared by value."""
        if not self._listeners:
            return (False,)
        scales = [listener.scale for listener in self._listeners]
        return (self._is_replaced(), *[scale for scale in scales if scale is not None])

    def _is_replaced(self) -> bool:
        """Whether the pipeline that was watched last holds other ControlNets than then."""
        known, parts = self._known
        pipe = known()
        return pipe is not None and any(
            id(getattr(pipe, name, None)) != part for name, part in parts.items()
        )

    def watch(self, pipe: Any, names: Mapping[str, Any] | None = None) -> None:
        """Take note of the pipeline's ControlNets and their scales, if it has any.

        `names` are the local variables of its call where that is at work: they tell the scale of a
        step at which the ControlNet has run already.
        """
        parts = control_parts(pipe)
        if parts:
            self._known = weakref.ref(pipe), {name: id(part) for name, part in parts.items()}
        for control in controls_of(pipe):
            if not any(known.is_on(control) for known in self._listeners):
                self._listeners.append(ControlListener(control, control_scale(names or {})))

    def unwatch(self) -> None:
        """Undo `watch`."""
        for listener in self._listeners:
            listener.remove()
        self._listeners.clear()
