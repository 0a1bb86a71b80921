"""Assemble the embedded pipelines from untrained parts of the diffusers classes."""

from __future__ import annotations

from collections.abc import Iterable

from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLQwenImage,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
    HunyuanVideoResnetBlockCausal3D,
)
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageResidualBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from transformers import CLIPTextModelWithProjection

from lesa_testbed.text import (
    clip_encoder,
    clip_tokenizer,
    llama_encoder,
    llama_tokenizer,
    qwen_encoder,
    qwen_tokenizer,
    t5_encoder,
    t5_tokenizer,
    vocabulary,
)

LATENT_CHANNELS = 12
IMAGE_SIZE = 64
VIDEO_TEXT_LENGTH = 24
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


def hunyuan_autoencoder() -> AutoencoderKLHunyuanVideo:
    """HunyuanVideo's causal autoencoder in small: 4x down in space and in time."""
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=16,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=4,
        mid_block_add_attention=False,
    )
    zeroed(b.conv2 for b in vae.modules() if isinstance(b, HunyuanVideoResnetBlockCausal3D))
    return vae


def hunyuan_transformer() -> HunyuanVideoTransformer3DModel:
    """HunyuanVideo's architecture in small: 2 double and 4 single blocks of width 144, token
    refiner and guidance embedding included."""
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=4,
        attention_head_dim=36,
        num_layers=2,
        num_single_layers=4,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=64,
        pooled_projection_dim=64,
        rope_axes_dim=(12, 12, 12),
    )
    zeroed(block.norm1.linear for block in transformer.transformer_blocks)
    zeroed(block.norm1_context.linear for block in transformer.transformer_blocks)
    zeroed(block.norm.linear for block in transformer.single_transformer_blocks)
    zeroed((transformer.norm_out.linear, transformer.proj_out))
    return transformer


def hunyuan_pipeline() -> HunyuanVideoPipeline:
    """An untrained ``HunyuanVideoPipeline`` with every component and HunyuanVideo's shift."""
    words = vocabulary(moving=True)
    llama, clip = llama_tokenizer(VIDEO_TEXT_LENGTH), clip_tokenizer(words, max_length=77)
    return HunyuanVideoPipeline(
        text_encoder=llama_encoder(llama),
        tokenizer=llama,
        transformer=hunyuan_transformer(),
        vae=hunyuan_autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip_encoder(clip),
        tokenizer_2=clip,
    )
