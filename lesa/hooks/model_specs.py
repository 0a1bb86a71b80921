"""What must be known about each denoiser class: data, one row per class, no code per family."""

from __future__ import annotations

import inspect
from dataclasses import replace

from torch import nn

from lesa.core.checks import shown
from lesa.errors import LesaError
from lesa.hooks.model_spec import ModelSpec
from lesa.hooks.spec_discovery import Unclear, read_structure

__all__ = ["PROMPTS", "ModelSpec", "has_row", "known_models", "model_spec", "register_model"]


_DOUBLE_SINGLE = ("transformer_blocks", "single_transformer_blocks")
_DOUBLE = ("transformer_blocks",)
_TEXT_POOLED = ("encoder_hidden_states", "pooled_projections")
_IDS = ("img_ids", "txt_ids")

_ROWS = (
    ModelSpec(
        "FluxTransformer2DModel",
        _DOUBLE_SINGLE,
        conditioning=_TEXT_POOLED,
        unbatched=_IDS,
        embedding="time_text_embed",
    ),
    ModelSpec(
        "Flux2Transformer2DModel",
        _DOUBLE_SINGLE,
        unbatched=_IDS,
        embedding="time_guidance_embed",
        notes="the tail's input is a slice of [text, image]",
    ),
    ModelSpec(
        "ChromaTransformer2DModel",
        _DOUBLE_SINGLE,
        unbatched=_IDS,
        notes="the tail's input is a slice of [text, image]",
    ),
    ModelSpec(
        "QwenImageTransformer2DModel",
        _DOUBLE,
        unbatched=("img_shapes",),
        embedding="time_text_embed",
    ),
    ModelSpec("HunyuanVideoTransformer3DModel", _DOUBLE_SINGLE, conditioning=_TEXT_POOLED),
    ModelSpec(
        "HunyuanVideo15Transformer3DModel",
        _DOUBLE,
        conditioning=("encoder_hidden_states", "encoder_hidden_states_2"),
    ),
    ModelSpec("WanTransformer3DModel", ("blocks",), upcast=True),
    ModelSpec("SD3Transformer2DModel", _DOUBLE, conditioning=_TEXT_POOLED),
    ModelSpec("PixArtTransformer2DModel", _DOUBLE),
    ModelSpec(
        "DiTTransformer2DModel",
        _DOUBLE,
        conditioning=("class_labels",),
        notes="the tail reads transformer_blocks[0].norm1.emb",
    ),
    ModelSpec("CogVideoXTransformer3DModel", _DOUBLE, tail="norm_final"),
    ModelSpec("LTXVideoTransformer3DModel", _DOUBLE),
    ModelSpec(
        "ZImageTransformer2DModel",
        ("layers", "noise_refiner", "context_refiner"),
        tail="all_final_layer.2-1",
        latent="x",
        conditioning=(),
        notes="latent and output are lists of tensors",
    ),
    ModelSpec("SanaTransformer2DModel", _DOUBLE),
    ModelSpec(
        "UNet2DConditionModel",
        ("down_blocks",),
        tail="up_blocks.-1.resnets.-1",
        latent="sample",
        identities=("mid_block",),
        last=("up_blocks", "up_blocks.-1.resnets", "up_blocks.-1.attentions"),
        joined="conv_in",
        zeroed=("mid_block_additional_residual",),
        notes="hidden: a skipped step runs the last layer of the last block, as in DeepCache",
    ),
    ModelSpec("AllegroTransformer3DModel", _DOUBLE),
    ModelSpec(
        "AuraFlowTransformer2DModel", ("joint_transformer_blocks", "single_transformer_blocks")
    ),
    ModelSpec("BriaTransformer2DModel", _DOUBLE_SINGLE, conditioning=_TEXT_POOLED, unbatched=_IDS),
    ModelSpec("CogView4Transformer2DModel", _DOUBLE),
    ModelSpec(
        "HunyuanImageTransformer2DModel",
        _DOUBLE_SINGLE,
        conditioning=("encoder_hidden_states", "encoder_hidden_states_2"),
    ),
    ModelSpec(
        "Kandinsky5Transformer3DModel",
        ("visual_transformer_blocks", "text_transformer_blocks"),
        tail="out_layer",
        conditioning=_TEXT_POOLED,
        unbatched=("visual_rope_pos", "text_rope_pos"),
    ),
    ModelSpec("LongCatImageTransformer2DModel", _DOUBLE_SINGLE, unbatched=_IDS),
    ModelSpec("Lumina2Transformer2DModel", ("layers", "noise_refiner", "context_refiner")),
    ModelSpec("MochiTransformer3DModel", _DOUBLE),
    ModelSpec("OvisImageTransformer2DModel", _DOUBLE_SINGLE, unbatched=_IDS),
    ModelSpec("SanaVideoTransformer3DModel", _DOUBLE),
    ModelSpec("SkyReelsV2Transformer3DModel", ("blocks",), upcast=True),
)
_SPECS = {row.name: row for row in _ROWS}


def register_model(spec: ModelSpec) -> None:
    """Add a denoiser class, or replace its row.

    Raises:
        LesaError: it is no row, or it has a hidden tap and names no blocks.
    """
    if not isinstance(spec, ModelSpec):
        raise LesaError(f"spec={shown(spec)}: not a row; give a lesa.ModelSpec")
    if not spec.blocks and "hidden" in spec.taps:
        raise LesaError(
            f"ModelSpec.blocks=(): none is named for {spec.name}; name its block containers, or "
            "give taps=('output',)"
        )
    _SPECS[spec.name] = spec


def known_models() -> dict[str, ModelSpec]:
    """The rows, by the name of the class."""
    return dict(_SPECS)


def model_spec(model: object) -> ModelSpec:
    """Row of a model, by the name of its class or of a base class, else read from its structure,
    else from its arguments: then it has the output tap alone.

    Raises:
        LesaError: it is not a module, or its forward names no arguments, or a single one.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in _SPECS:
            return _SPECS[cls.__name__]
    if not isinstance(model, nn.Module):
        raise LesaError(
            f"model: {type(model).__name__} is not a torch module; give a pipeline or its denoiser"
        )
    try:
        return _read_row(model)
    except Unclear as reason:
        return _output_row(model, f"its hidden tap was not found: {reason}")


def has_row(model: nn.Module) -> bool:
    """Whether its class, or a base class, has a row."""
    return any(cls.__name__ in _SPECS for cls in type(model).__mro__)


_LATENTS = ("hidden_states", "sample", "latents", "x")
# What the arguments of a forward that hold prompts are called; what their names begin with.
PROMPTS = (
    "encoder_hidden_states",
    "pooled_",
    "class_labels",
    "text_",
    "clip_",
    "cap_feats",
    "prior_token_id",
    "proj_embedding",
    "global_hidden_states",
    "image_embed",
    "prompt_embed",
)


def _read_row(model: nn.Module) -> ModelSpec:
    """A row with both taps; Unclear where the hidden one cannot be relied on."""
    blocks, tail, arguments = read_structure(model)
    if "hidden_states" not in arguments:
        raise Unclear("its forward has no argument hidden_states")
    return replace(
        _output_row(model, "read from its forward"),
        blocks=blocks,
        tail=tail,
        taps=("output", "hidden"),
    )


def _output_row(model: nn.Module, notes: str) -> ModelSpec:
    """A row with the output tap alone, from the names of the forward's arguments."""
    kind = type(model)
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not named:
        raise LesaError(
            f"model: the forward of {kind.__name__} does not name its arguments; give the model "
            "that it calls, or a module whose forward(latent, time, ...) calls it"
        )
    if len(parameters) == 1:
        raise LesaError(
            f"model: {kind.__name__}'s forward takes {named[0]!r} alone, so it is no denoiser; "
            "give a pipeline, or the module whose forward(latent, time, ...) its loop calls"
        )
    return ModelSpec(
        kind.__name__,
        tail="",
        latent=next((name for name in _LATENTS if name in named), named[0]),
        conditioning=tuple(name for name in named if name.startswith(PROMPTS)),
        unbatched=tuple(name for name in _IDS if name in named),
        stateful=tuple(name for name in named if "cache" in name),
        taps=("output",),
        notes=notes,
    )
