"""Slots of requests for vLLM-Omni's step-wise batching: a driver for its `DiTCacheManager`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lesa
from lesa.integrations.vllm_omni import part, transformers

__all__ = ["StateDriver", "state_driver"]


def state_driver(pipeline: Any) -> Any:
    """A `DiTCacheStateDriverBase` over `StateDriver`, for the engine's `DiTCacheManager`."""
    base = part("cache.dit_cache_manager").DiTCacheStateDriverBase
    return type("LesaStateDriver", (StateDriver, base), {})(pipeline)


class StateDriver:
    """Slots of requests whose steps the engine interleaves in one thread: each is a `lesa.Slot` for
    every transformer, so that a request is what it is alone.

    Attributes:
        scheduler: of the request whose slot is made next, where it is not the pipeline's.
    """

    backend_name = "lesa"

    def __init__(self, pipeline: Any) -> None:
        self._models, self._batch = transformers(pipeline), ExitStack()
        self.scheduler: Any = None

    def create_empty_slot(self) -> Any:
        """Of the engine's class; its payload holds the slots."""
        payload = tuple(lesa.Slot(model, scheduler=self.scheduler) for model in self._models)
        slot = part("worker.utils").CacheBackendSlot(self.backend_name, payload)
        slot.metadata["follows"] = self.scheduler is not None
        return slot

    def install_slot(self, slot: Any) -> None:
        """The next calls are of this request."""
        for own in slot.payload:
            own.step_index = None
            own.install()

    def initialize_fresh_slot(self, slot: Any, num_inference_steps: int) -> None:
        """Begin with a request of so many steps, in a slot that was just made."""
        slot.metadata["num_inference_steps"] = num_inference_steps
        self.install_slot(slot)

    def is_slot_compatible(self, slot: Any, num_inference_steps: int) -> bool:
        """Whether its run can go on with so many steps."""
        told = slot.metadata.get("num_inference_steps", num_inference_steps)
        return told == num_inference_steps and all(
            own.is_compatible(num_inference_steps=num_inference_steps) for own in slot.payload
        )

    def deactivate_slot(self, slot: Any) -> None:
        """The next calls are not of this request; its state stays in the slot."""
        for own in slot.payload if slot is not None else ():
            own.deactivate()

    def clear_slot(self, slot: Any) -> None:
        """Let go of its features."""
        for own in slot.payload:
            own.clear()
        slot.metadata.clear()

    def estimate_slot_bytes(self, slot: Any) -> int:
        """Bytes of its features."""
        return sum(own.bytes for own in slot.payload)

    def install_batch_slots(self, states: list[Any]) -> None:
        """The next calls hold rows of several requests, each at its own step."""
        self.deactivate_batch_slots()
        rows = [len(state.latents) for state in states]
        for slot, state in ((state.cache_slot, state) for state in states):
            for own in slot.payload:
                own.step_index = None if slot.metadata.get("follows") else state.step_index
        for slots in zip(*(state.cache_slot.payload for state in states), strict=True):
            self._batch.enter_context(lesa.Slot.batch(list(slots), rows))

    def deactivate_batch_slots(self) -> None:
        """The next calls are of none of them."""
        self._batch.close()
