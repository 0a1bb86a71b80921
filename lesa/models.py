"""What must be known about each denoiser class: data, one row per class, no code per family."""

from __future__ import annotations

from dataclasses import dataclass

from lesa.errors import LesaError

__all__ = ["ModelSpec", "known_models", "model_spec", "register_model"]


@dataclass(frozen=True)
class ModelSpec:
    """Where a denoiser class keeps its blocks, its tail and its latent.

    `blocks` are the `ModuleList`s that a skipped step does not run, `identities` the modules that
    it passes through. The *hidden* feature is the first argument of `tail`. `latent` names the
    argument that holds the current latent, `conditioning` those whose identity tells a changed
    prompt, `unbatched` those without a batch dimension; `dropped` ones are not passed on a skipped
    step. `embedding` is the module that turns (time, ...) into what modulates `tail`, for models
    that return `proj_out(tail(h, embedding(...)))` as it is. `upcast` marks models that hand the
    tail an fp32 copy of a narrower feature.
    """

    name: str
    blocks: tuple[str, ...]
    tail: str = "norm_out"
    latent: str = "hidden_states"
    conditioning: tuple[str, ...] = ("encoder_hidden_states",)
    unbatched: tuple[str, ...] = ()
    identities: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    embedding: str = ""
    upcast: bool = False
    notes: str = ""


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
        tail="norm_out",
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
        notes="latent and output are lists of tensors, so only the hidden tap applies",
    ),
    ModelSpec("SanaTransformer2DModel", _DOUBLE),
    ModelSpec(
        "UNet2DConditionModel",
        ("down_blocks", "up_blocks"),
        tail="conv_norm_out",
        latent="sample",
        identities=("mid_block",),
        dropped=("down_block_additional_residuals", "mid_block_additional_residual"),
    ),
)
_SPECS = {row.name: row for row in _ROWS}


def register_model(spec: ModelSpec) -> None:
    """Add a denoiser class, or replace its row."""
    if not spec.blocks:
        raise LesaError(f"ModelSpec.blocks is empty for {spec.name}: name its block containers.")
    _SPECS[spec.name] = spec


def known_models() -> tuple[str, ...]:
    """Names of the denoiser classes that can be accelerated."""
    return tuple(_SPECS)


def model_spec(model: object) -> ModelSpec:
    """Row of a model, by the name of its class or of a base class.

    Raises:
        LesaError: no row; the message lists the known classes.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in _SPECS:
            return _SPECS[cls.__name__]
    raise LesaError(
        f"model: {type(model).__name__} is not a known denoiser class "
        f"({', '.join(_SPECS)}); add a row with lesa.models.register_model."
    )
