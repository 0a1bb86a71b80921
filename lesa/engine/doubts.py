"""What may go wrong with a configuration on a model: told in one warning when it is enabled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lesa.engine.config import LesaConfig
from lesa.engine.step_tables import needs_levels
from lesa.forecasters.calibration import keeps_rows, untrained
from lesa.hooks.scheduler_advice import first_order, unfollowed
from lesa.hooks.weights_hash import weights_hash
from lesa.hooks.wrappers import core_of

__all__ = ["doubts", "doubts_of_count"]


def doubts(models: Sequence[nn.Module], config: LesaConfig, scheduler: Any = None) -> list[str]:
    """A sentence each: other weights, an untrained number of full steps, a PSNR of the fit's own
    prompts, a scheduler that cannot be followed."""
    found = [
        *_of_weights(models, config.forecaster),
        *doubts_of_count(config),
        *_of_target(config),
        *_of_scheduler(config, scheduler),
    ]
    return list(dict.fromkeys(found))


def _of_weights(models: Sequence[nn.Module], forecaster: Any) -> Iterator[str]:
    for model in models:
        trained = getattr(forecaster, "metadata", {}).get("model_hash")
        difference = _difference(core_of(model), trained)
        if difference is not None:
            yield (
                f"the forecaster {forecaster.name} was trained on other weights: {difference}; see "
                "with `lesa compare` whether it serves them, or train one with lesa.train."
            )


def doubts_of_count(config: LesaConfig) -> Iterator[str]:
    """A sentence where the number of full steps was not trained."""
    wanted = config.full_steps
    calibrations = getattr(config.forecaster, "calibrations", [])
    counts = sorted({len(c.schedule.full_steps) for c in calibrations}, reverse=True)
    if wanted is None or not counts or wanted in counts:
        return
    kept = keeps_rows(calibrations, wanted)
    worth = "at little more than its quality" if kept else "with coefficients not fitted to that"
    yield (
        f"full_steps={wanted} was not trained, only {' and '.join(map(str, counts))}: it runs as "
        f"{untrained(calibrations, wanted)}, {worth}; train with full_steps={wanted}."
    )


def _of_target(config: LesaConfig) -> Iterator[str]:
    worths = [entry.worth for entry in getattr(config.forecaster, "calibrations", [])]
    seen = any(worth is not None and not worth.validated for worth in worths)
    if config.target_psnr is not None and seen:
        yield (
            f"{config.target}: it was measured on the prompts of the fit itself, and others may "
            "come out worse; train with validation prompts."
        )


def _of_scheduler(config: LesaConfig, scheduler: Any) -> Iterator[str]:
    by_levels = scheduler is not None and needs_levels(config.forecaster)
    reason = None if scheduler is None else unfollowed(scheduler, by_levels)
    if reason is not None:
        yield (
            f"scheduler={type(scheduler).__name__}: {reason}, so that every step is computed in "
            f"full; use {first_order(scheduler)}."
        )


def _difference(model: nn.Module, trained: str | None) -> str | None:
    """How the weights differ from those of the hash `trained`, as far as that can be told."""
    adapters = getattr(model, "peft_config", None)
    if trained is None:
        return None
    if adapters:
        return f"this {type(model).__name__} has the adapters {', '.join(adapters)}"
    if not _has_plain_weights(model):
        return None
    found = weights_hash(model)
    if found in trained.split("+"):  # one of each transformer
        return None
    return f"model_hash={trained!r}, this {type(model).__name__} has {found!r}"


def _has_plain_weights(model: nn.Module) -> bool:
    """Whether a hash of the weights means something: no quantiser or offload on them."""
    plain = {torch.float32, torch.bfloat16}
    return getattr(model, "hf_quantizer", None) is None and all(
        p.dtype in plain and p.device.type != "meta" for p in model.parameters()
    )
