"""Real diffusers pipelines, tiny and with random weights: built in milliseconds, nothing loaded.

`build("flux")` gives a pipeline and a function that makes the arguments of its call: the same ones
for the same options, guidance on wherever the pipeline has it, latents as output. Each row is a
function that returns the pipeline class, its parts and the arguments that are its own; parts that
it does not name (tokenizers, text encoders) are None, since embeddings are passed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch

Row = tuple[Any, dict[str, Any], dict[str, Any]]

ROWS: dict[str, Callable[[], Row]] = {}
IMG2IMG = {  # the pipeline that takes a strength, and the shape of its picture or its frames
    "flux": ("FluxImg2ImgPipeline", (1, 3, 16, 16)),
    "chroma": ("ChromaImg2ImgPipeline", (1, 3, 16, 16)),
    "qwen": ("QwenImageImg2ImgPipeline", (1, 3, 32, 32)),
    "wan": ("WanVideoToVideoPipeline", (9, 3, 32, 32)),
    "sd3": ("StableDiffusion3Img2ImgPipeline", (1, 3, 8, 8)),
    "cogvideox": ("CogVideoXVideoToVideoPipeline", (9, 3, 32, 32)),
    "z-image": ("ZImageImg2ImgPipeline", (1, 3, 16, 16)),
    "sdxl": ("StableDiffusionXLImg2ImgPipeline", (1, 3, 16, 16)),
}


def build(name: str) -> tuple[Any, Callable[..., dict[str, Any]]]:
    """A pipeline in evaluation mode, and `call(batch=1, **more)` that makes its arguments."""
    torch.manual_seed(0)
    cls, parts, own = ROWS[name]()
    signature = inspect.signature(cls.__init__).parameters
    optional = {key for key, value in signature.items() if value.default is not value.empty}
    pipe = cls(**dict.fromkeys(set(signature) - optional - {"self"}) | parts)
    pipe.set_progress_bar_config(disable=True)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()

    def call(batch: int = 1, **more: Any) -> dict[str, Any]:
        arguments = {"num_inference_steps": 6, "output_type": "latent"} | own
        arguments = {key: _repeat(value, batch) for key, value in arguments.items()}
        return arguments | {"generator": torch.Generator().manual_seed(7)} | more

    return pipe, call


def build_img2img(name: str) -> tuple[Any, Callable[..., dict[str, Any]]]:
    """As `build`, for the pipeline of `IMG2IMG` that goes from a picture; 6 of 12 steps are run."""
    plain, call = build(name)
    kind, shape = IMG2IMG[name]
    pipe = getattr(diffusers, kind).from_pipe(plain)
    pipe.set_progress_bar_config(disable=True)
    known = inspect.signature(pipe.__call__).parameters
    pixels = draw(*shape).sigmoid()
    frames = [frame.movedim(0, -1).numpy() for frame in pixels]
    source = {"video": frames} if "video" in known else {"image": pixels}

    def from_picture(batch: int = 1, **more: Any) -> dict[str, Any]:
        given = {key: value for key, value in call(batch).items() if key in known}
        return given | source | {"num_inference_steps": 12, "strength": 0.5} | more

    return pipe, from_picture


def run(pipe: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """The images, frames or latents of one call."""
    return torch.as_tensor(pipe(**arguments)[0])


def row(name: str) -> Callable[[Callable[[], Row]], Callable[[], Row]]:
    """Enter a row into the table."""
    return lambda make: ROWS.setdefault(name, make)


@row("flux")
def _flux() -> Row:
    parts = {"transformer": _flux_transformer(), "scheduler": _flow(), "vae": _vae(1)}
    return diffusers.FluxPipeline, parts, _FLUX_CALL


@row("kontext")
def _kontext() -> Row:
    parts = {"transformer": _flux_transformer(), "scheduler": _flow(), "vae": _vae(1)}
    own = {"image": draw(1, 3, 16, 16), "max_area": 256, "_auto_resize": False}
    return diffusers.FluxKontextPipeline, parts, _FLUX_CALL | own


@row("flux2")
def _flux2() -> Row:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
    )
    parts = {"transformer": transformer, "scheduler": _flow(), "vae": vae}
    own = {"prompt_embeds": draw(1, 6, 32)} | _size(16)
    return diffusers.Flux2Pipeline, parts, own


@row("chroma")
def _chroma() -> Row:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    parts = {"transformer": transformer, "scheduler": _flow(), "vae": _vae(1)}
    masks = {name: mask.bool() for name, mask in _masks("prompt_attention_mask", 6).items()}
    own = _both("prompt_embeds", 1, 6, 32) | masks | _size(16)
    return diffusers.ChromaPipeline, parts, own


@row("qwen")
def _qwen() -> Row:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    parts = {"transformer": transformer, "scheduler": _flow(), "vae": vae}
    own = _both("prompt_embeds", 1, 6, 16) | _masks("prompt_embeds_mask", 6) | _size(32)
    return diffusers.QwenImagePipeline, parts, own


@row("hunyuan-video")
def _hunyuan_video() -> Row:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    own = _both("prompt_embeds", 1, 6, 16) | _both("pooled_prompt_embeds", 1, 8)
    own |= _masks("prompt_attention_mask", 6) | _size(32) | {"num_frames": 9, "true_cfg_scale": 3.0}
    return diffusers.HunyuanVideoPipeline, {"transformer": transformer, "scheduler": _flow()}, own


@row("hunyuan-video-15")
def _hunyuan_video_15() -> Row:
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=12,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
    )
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=6.0)
    parts = {"transformer": transformer, "scheduler": _flow(), "vae": vae, "guider": guider}
    own = _both("prompt_embeds", 1, 6, 16) | _both("prompt_embeds_2", 1, 5, 12)
    own |= _masks("prompt_embeds_mask", 6) | _masks("prompt_embeds_mask_2", 5)
    return diffusers.HunyuanVideo15Pipeline, parts, own | _size(64) | {"num_frames": 9}


@row("wan")
def _wan() -> Row:
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    parts = {"transformer": transformer, "scheduler": scheduler, "vae": vae}
    own = _both("prompt_embeds", 1, 6, 16) | _size(32) | {"num_frames": 9}
    return diffusers.WanPipeline, parts, own


@row("sd3")
def _sd3() -> Row:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
    )
    parts = {"transformer": transformer, "scheduler": _flow(), "vae": _vae(4)}
    own = _both("prompt_embeds", 1, 6, 32) | _both("pooled_prompt_embeds", 1, 16) | _size(8)
    return diffusers.StableDiffusion3Pipeline, parts, own


@row("pixart")
def _pixart() -> Row:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=8,
        caption_channels=32,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler()
    parts = {"transformer": transformer, "scheduler": scheduler, "vae": _vae(4)}
    own = _both("prompt_embeds", 1, 6, 32) | _masks("prompt_attention_mask", 6) | _UNCLEANED
    return diffusers.PixArtSigmaPipeline, parts, own | _size(8)


@row("dit")
def _dit() -> Row:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        out_channels=8,
        num_layers=2,
        sample_size=8,
    )
    parts = {"transformer": transformer, "scheduler": diffusers.DDIMScheduler(), "vae": _vae(4)}
    return diffusers.DiTPipeline, parts, {"class_labels": [1], "output_type": "np"}


@row("cogvideox")
def _cogvideox() -> Row:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=6,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    parts = {
        "transformer": transformer,
        "scheduler": diffusers.CogVideoXDDIMScheduler(),
        "vae": vae,
    }
    own = _both("prompt_embeds", 1, 6, 32) | _size(32) | {"num_frames": 9}
    return diffusers.CogVideoXPipeline, parts, own


@row("ltx")
def _ltx() -> Row:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    own = _both("prompt_embeds", 1, 6, 32) | _masks("prompt_attention_mask", 6) | _size(64)
    parts = {"transformer": transformer, "scheduler": _flow()}
    return diffusers.LTXPipeline, parts, own | {"num_frames": 9}


@row("z-image")
def _z_image() -> Row:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for name in ("x_pad_token", "cap_pad_token"):  # made with torch.empty
        torch.nn.init.normal_(getattr(transformer, name))
    parts = {"transformer": transformer, "scheduler": _flow(), "vae": _vae(4)}
    own = {"prompt_embeds": [draw(6, 16)], "negative_prompt_embeds": [draw(5, 16)]}
    return diffusers.ZImagePipeline, parts, own | _size(16)


@row("sana")
def _sana() -> Row:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    own = _both("prompt_embeds", 1, 6, 8) | _masks("prompt_attention_mask", 6) | _UNCLEANED
    parts = {"transformer": transformer, "scheduler": scheduler}
    return diffusers.SanaPipeline, parts, own | _size(64)


@row("sdxl")
def _sdxl() -> Row:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        cross_attention_dim=16,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    parts = {"unet": unet, "scheduler": diffusers.EulerDiscreteScheduler(), "vae": _vae(4)}
    own = _both("prompt_embeds", 1, 6, 16) | _both("pooled_prompt_embeds", 1, 16) | _size(16)
    return diffusers.StableDiffusionXLPipeline, parts, own


def _flux_transformer() -> Any:
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )


def _flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def _vae(channels: int) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4,),
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )


def wan_22(boundary: float = 0.5) -> tuple[Any, Callable[..., dict[str, Any]]]:
    """Wan 2.2: one transformer for high noise, another for low."""
    pipe, call = build("wan")
    second = build("wan")[0].transformer
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.1)
    parts = {**pipe.components, "transformer_2": second}
    pipe = diffusers.WanPipeline(**parts, boundary_ratio=boundary)
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def draw(*shape: int, seed: int = 3) -> torch.Tensor:
    """A random tensor: the same one for the same shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _both(name: str, *shape: int) -> dict[str, Any]:
    """The embeddings of the prompt and of the negative prompt."""
    return {name: draw(*shape), f"negative_{name}": draw(*shape, seed=4)}


def _masks(name: str, length: int) -> dict[str, Any]:
    ones = torch.ones(1, length, dtype=torch.int64)
    return {name: ones, f"negative_{name}": ones}


def _size(pixels: int) -> dict[str, int]:
    return {"height": pixels, "width": pixels}


def _repeat(value: Any, batch: int) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.cat([value] * batch)
    return value * batch if isinstance(value, list) else value


_FLUX_CALL = {
    **_both("prompt_embeds", 1, 6, 32),
    **_both("pooled_prompt_embeds", 1, 16),
    **_size(16),
    "true_cfg_scale": 3.0,
}
_UNCLEANED = {"negative_prompt": None, "clean_caption": False, "use_resolution_binning": False}
