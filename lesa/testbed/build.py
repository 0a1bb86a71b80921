"""Assemble the embedded pipelines from untrained parts of the diffusers classes."""

from __future__ import annotations

from collections.abc import Iterable

from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageResidualBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from transformers import CLIPTextModelWithProjection

from lesa.testbed.text import (
    clip_encoder,
    clip_tokenizer,
    qwen_encoder,
    qwen_tokenizer,
    t5_encoder,
    t5_tokenizer,
)

LATENT_CHANNELS = 12
IMAGE_SIZE = 64
TOKENS = (IMAGE_SIZE // 8) ** 2  # the VAE shrinks by 4, packing by 2


def zeroed(layers: Iterable[nn.Module]) -> None:
    """Set linear or convolution layers to zero, so that what they add starts out as nothing."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def autoencoder() -> AutoencoderKL:
    """A 4x-downsampling KL autoencoder (0.65 M parameters) whose residual blocks start as
    identity.

    After 200 steps that start is 4 dB ahead of diffusers' own initialisation.
    """
    down, up = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    vae = AutoencoderKL(
        down_block_types=down,
        up_block_types=up,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
    )
    zeroed(block.conv2 for block in vae.modules() if isinstance(block, ResnetBlock2D))
    return vae


def flux_transformer() -> FluxTransformer2DModel:
    """FLUX.1-dev's architecture in small: 2 double and 4 single blocks of width 192, guidance
    embedding included; modulations and output start at zero, as in DiT."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    zeroed(block.norm1.linear for block in transformer.transformer_blocks)
    zeroed(block.norm1_context.linear for block in transformer.transformer_blocks)
    zeroed(block.norm.linear for block in transformer.single_transformer_blocks)
    zeroed((transformer.norm_out.linear, transformer.proj_out))
    return transformer


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX's scheduler; the shift at the embedded pipeline's token count equals FLUX.1-dev's at
    1024 x 1024."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=4,
        max_image_seq_len=TOKENS,
    )


def flux_pipeline() -> FluxPipeline:
    """An untrained ``FluxPipeline`` with every component."""
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        scheduler=flow_scheduler(),
        vae=autoencoder(),
        text_encoder=clip_encoder(clip),
        tokenizer=clip,
        text_encoder_2=t5_encoder(t5),
        tokenizer_2=t5,
        transformer=flux_transformer(),
    )


def qwen_autoencoder() -> AutoencoderKLQwenImage:
    """Qwen-Image's causal 3-D autoencoder in small, 4x down in space; its latents need no
    normalisation, being FLUX's normalised ones."""
    vae = AutoencoderKLQwenImage(
        base_dim=12,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, False],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    zeroed(block.conv2 for block in vae.modules() if isinstance(block, QwenImageResidualBlock))
    return vae


def qwen_transformer() -> QwenImageTransformer2DModel:
    """Qwen-Image's architecture in small: 5 dual-stream blocks of width 160."""
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=128,
        axes_dims_rope=(8, 12, 12),
    )
    zeroed(block.img_mod for block in transformer.transformer_blocks)
    zeroed(block.txt_mod for block in transformer.transformer_blocks)
    zeroed((transformer.norm_out.linear, transformer.proj_out))
    return transformer


def qwen_pipeline() -> QwenImagePipeline:
    """An untrained ``QwenImagePipeline`` with every component."""
    tokenizer = qwen_tokenizer()
    return QwenImagePipeline(
        scheduler=flow_scheduler(),
        vae=qwen_autoencoder(),
        text_encoder=qwen_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=qwen_transformer(),
    )


def sdxl_unet() -> UNet2DConditionModel:
    """SDXL's U-Net in small: attention on the two lower levels, size and pooled-text embedding."""
    unet = UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=(1, 2, 3),  # diffusers means the number of heads
        cross_attention_dim=128,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=64 + 6 * 16,
        norm_num_groups=8,
    )
    zeroed(block.conv2 for block in unet.modules() if isinstance(block, ResnetBlock2D))
    zeroed((unet.conv_out,))
    return unet


def sdxl_pipeline(vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    """An untrained ``StableDiffusionXLPipeline`` on a trained autoencoder, SDXL's own scheduler."""
    clip = clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=clip_encoder(clip, layers=3),
        text_encoder_2=clip_encoder(clip, layers=3, cls=CLIPTextModelWithProjection),
        tokenizer=clip,
        tokenizer_2=clip,
        unet=sdxl_unet(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )
