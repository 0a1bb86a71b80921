"""Whether blocks of a model can run alone, and which those are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lesa.errors import LesaError
from lesa.hooks.model_specs import model_spec
from lesa.hooks.wrappers import core_of

__all__ = [
    "argument_names",
    "blocks_of",
    "check_two_blocks",
    "check_weights",
    "feature_width",
    "unfit",
    "unfit_class",
]

_BY_PLACE = ("ChromaTransformer2DModel",)  # whose forward modulates each block by its number


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's blocks in the order in which they run."""
    spec = model_spec(model)
    return [block for name in spec.blocks for block in spec.module(model, name).children()]


def unfit_class(model: nn.Module) -> str | None:
    """Why the blocks of a class cannot run alone, or None; asked of its name and row only."""
    spec = model_spec(core_of(model))
    if "hidden" not in spec.taps or spec.identities or spec.last:
        return "it is no sequence of blocks that hand on one feature"
    if not all(name.startswith("single_") for name in spec.blocks[1:]):
        return f"{' and '.join(spec.blocks)} do not run one after the other"
    return "what modulates a block goes by its number" if spec.name in _BY_PLACE else None


def unfit(model: nn.Module) -> str | None:
    """Why the blocks of a model cannot run alone, or None."""
    core = core_of(model)
    if (reason := unfit_class(model)) is not None:
        return reason
    blocks = blocks_of(core)
    if len(blocks) < 2:
        return f"it has {len(blocks)} block"
    wanting = [block for block in blocks if "hidden_states" not in argument_names(block)]
    if wanting:
        return f"{type(wanting[0]).__name__} takes no hidden_states"
    if core is not model or core._compiled_call_impl is not None:
        return "it is wrapped or compiled as a whole"
    return None


def check_two_blocks(model: nn.Module) -> None:
    """LesaError where the blocks of a model cannot run alone."""
    reason = unfit(model)
    if reason is not None:
        raise LesaError(
            f"form='disca': the blocks of {type(core_of(model)).__name__} cannot run alone "
            f"({reason}); use form='continuous' or 'table'"
        )


def check_weights(core: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """LesaError unless a state dict of `TwoBlocks` is of such blocks as the model's."""
    first, *_, last = blocks_of(core)
    known = {f"first.{name}": part for name, part in first.state_dict().items()}
    known |= {f"last.{name}": part for name, part in last.state_dict().items()}
    wide = feature_width(core)
    shapes = {
        name: part.shape if part.is_floating_point() else None for name, part in known.items()
    }
    shapes |= {"join.weight": torch.Size([wide, 2 * wide]), "join.bias": torch.Size([wide])}
    if shapes != {name: part.shape for name, part in weights.items()}:
        raise LesaError(
            f"form='disca': the blocks of this {type(core).__name__} are not those that the "
            "forecaster was trained with; unload adapters and quantisers, or train one for it"
        )


def argument_names(block: nn.Module) -> list[str]:
    """What the forward of a block takes, in order."""
    return list(inspect.signature(type(block).forward).parameters)[1:]


def feature_width(core: nn.Module) -> int:
    """C, the channels of a feature."""
    inner: Any = getattr(core, "inner_dim", None)
    if inner is None:
        config: Any = core.config
        inner = config.num_attention_heads * config.attention_head_dim
    return int(inner)
