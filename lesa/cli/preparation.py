"""What a recipe does to a pipeline beyond options: an adapter, scheduler settings, memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lesa.cli.config_fields import check_fields
from lesa.cli.names import choose
from lesa.cli.recipe_values import (
    as_flag,
    as_name,
    as_number,
    as_settings,
    as_text,
    checked,
    known,
    mapping,
)
from lesa.errors import LesaError, is_out_of_memory

__all__ = ["Preparation"]

OFFLOADS = ("none", "model", "sequential")
_LORA = {"source": as_name, "file": as_name, "scale": as_number}
_UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2.0**20, "GiB": 2.0**30}


@dataclass(frozen=True)
class Preparation:
    """How a loaded pipeline is made ready.

    Attributes:
        told: how messages begin, with the recipe's name.
        lora: source (a folder or hub id), file and scale of an adapter that is fused into the
            weights; empty for none.
        scheduler_config: fields of the scheduler's configuration that are changed.
        offload: "model" or "sequential", diffusers' ways to keep weights on the host until they
            run; on a CPU there is nothing to move.
        vae_tiling, vae_slicing: diffusers' ways to decode in parts.
        device_bytes: memory of the device that the recipe was planned for.
    """

    told: str = ""
    lora: Mapping[str, Any] = field(default_factory=dict)
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)
    offload: str = "none"
    vae_tiling: bool = False
    vae_slicing: bool = False
    device_bytes: int | None = None

    @classmethod
    def read(cls, told: str, values: Mapping[str, Any]) -> Preparation:
        """From the mapping of a recipe; LesaError for an unknown name or a wrong type."""
        lora = known(told, "lora", mapping(told, "lora", values), _LORA)
        if lora and "source" not in lora:
            raise LesaError(f"{told}: lora has no source; give the folder or hub id of the adapter")
        memory = known(told, "memory", mapping(told, "memory", values), _MEMORY)
        if "offload" in memory:
            choose(memory["offload"], OFFLOADS, f"{told}: memory.offload")
        config = checked(told, "scheduler_config", values.get("scheduler_config", {}), as_settings)
        return cls(told, lora, config, device_bytes=memory.pop("device", None), **memory)

    def place(self, pipe: Any, device: Any) -> Any:
        """The pipeline on a device, with the adapter fused and what saves memory switched on.

        Raises: LesaError for an adapter that cannot be had, or what the pipeline does not offer.
        """
        if self.lora:
            self._fuse(pipe)
        for wanted, name in ((self.vae_tiling, "tiling"), (self.vae_slicing, "slicing")):
            if wanted:
                self._switch(getattr(pipe, "vae", None), f"enable_{name}", f"vae-{name}")
        if self.offload == "none" or device.type == "cpu":
            return pipe.to(device)
        self._switch(pipe, f"enable_{self.offload}_cpu_offload", "offload", device=device)
        return pipe

    def set_scheduler(self, pipe: Any) -> None:
        """Change what the recipe changes of the scheduler's configuration."""
        if self.scheduler_config:
            kind, config = type(pipe.scheduler), pipe.scheduler.config
            check_fields(self.told, "scheduler-config", kind, self.scheduler_config)
            pipe.scheduler = kind.from_config(config, **self.scheduler_config)

    def check_scheduler(self, name: str | None, config: Mapping[str, Any] | None) -> None:
        """LesaError for a field that the scheduler does not have, as far as it can be told: by its
        name as an option, or the configuration that the pipeline has."""
        import diffusers

        from lesa.cli.schedulers import CLASSES

        own = str((config or {}).get("_class_name"))
        kind = getattr(diffusers, CLASSES.get(str(name), own), None)
        if kind is not None:
            check_fields(self.told, "scheduler-config", kind, self.scheduler_config)

    def _fuse(self, pipe: Any) -> None:
        source, file = self.lora["source"], self.lora.get("file")
        try:
            pipe.load_lora_weights(source, weight_name=file)
            pipe.fuse_lora(lora_scale=self.lora.get("scale", 1.0))
            pipe.unload_lora_weights()
        except Exception as error:  # no network, no such file, another model's adapter, ...
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise LesaError(
                f"{self.told}: lora.source={source!r}: {type(pipe).__name__} cannot have it"
                f" ({reason.rstrip(' .')}); give the folder or hub id, and the file, of an adapter"
                " for this model"
            ) from error

    def _switch(self, part: Any, method: str, name: str, **more: Any) -> None:
        if not hasattr(part, method):
            raise LesaError(
                f"{self.told}: memory.{name}: {type(part).__name__} has no {method}; leave it out"
            )
        getattr(part, method)(**more)


def _size(value: Any) -> int:
    """ "80GB" -> 80e9 bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(\w+)\s*", str(value))
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"a size of memory; give one such as 80GB ({', '.join(_UNITS)})")
    return int(float(match[1]) * _UNITS[match[2]])


_MEMORY = {"offload": as_text, "vae_tiling": as_flag, "vae_slicing": as_flag, "device": _size}
