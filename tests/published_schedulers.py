"""The scheduler configurations that diffusers publishes for its pipelines, with where they stand.

A source is a conversion script of diffusers' scripts/, at huggingface/diffusers 58eb52c, or another
file of that repository. Where none says it, "Hub" stands for the model's own repository.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import diffusers


class Published(NamedTuple):
    """A scheduler of diffusers and its options, and the file that says so."""

    scheduler: str
    options: dict[str, Any]
    source: str

    def make(self) -> Any:
        """The scheduler."""
        return getattr(diffusers, self.scheduler)(**self.options)


_FLOW, _UNIPC = "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"
_DPM, _DDIM = "DPMSolverMultistepScheduler", "DDIMScheduler"
_COGVIDEOX = "CogVideoXDDIMScheduler"
_LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_ZERO_SNR = {
    **_LATENT,
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
}
_FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
_LTX = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}
_FLUX = {"shift": 3.0, "use_dynamic_shifting": True}
_LIGHTNING = {
    "base_shift": math.log(3),
    "max_shift": math.log(3),
    "max_image_seq_len": 8192,
    "use_dynamic_shifting": True,
}
_SINGLE = "src/diffusers/loaders/single_file_utils.py"
_FLUX_HUB = "convert_flux2_to_diffusers.py, from FLUX.1-dev on the Hub"

# By the names of tests/tiny_pipelines.py.
TINY = {
    "flux": Published(_FLOW, _FLUX, _FLUX_HUB),
    "kontext": Published(_FLOW, _FLUX, _FLUX_HUB),
    "flux2": Published(_FLOW, _FLUX, _FLUX_HUB),
    "chroma": Published(_FLOW, {}, "no script: the defaults of the class"),
    "qwen": Published(_FLOW, _LIGHTNING, "docs/source/en/api/pipelines/qwenimage.md"),
    "hunyuan-video": Published(_FLOW, {"shift": 7.0}, "convert_hunyuan_video_to_diffusers.py"),
    "hunyuan-video-15": Published(
        _FLOW, {"shift": 9.0}, "convert_hunyuan_video1_5_to_diffusers.py"
    ),
    "wan": Published(_UNIPC, _FLOW_SIGMAS | {"flow_shift": 16.0}, "convert_wan_to_diffusers.py"),
    "sd3": Published(_FLOW, {"shift": 3.0}, "Hub"),
    "pixart": Published(_DPM, {}, "convert_pixart_sigma_to_diffusers.py"),
    "dit": Published(
        _DDIM, {"beta_schedule": "linear", "clip_sample": False}, "convert_dit_to_diffusers.py"
    ),
    "cogvideox": Published(
        _COGVIDEOX, _ZERO_SNR | {"snr_shift_scale": 3.0}, "convert_cogvideox_to_diffusers.py"
    ),
    "ltx": Published(_FLOW, _LTX, "convert_ltx_to_diffusers.py"),
    "z-image": Published(_FLOW, {"shift": 3.0}, "Hub"),
    "sana": Published(_DPM, _FLOW_SIGMAS | {"flow_shift": 3.0}, "convert_sana_to_diffusers.py"),
    "sdxl": Published("EulerDiscreteScheduler", _LATENT | {"steps_offset": 1}, _SINGLE),
}

# By the names of lesa.testbed.
EMBEDDED = {
    "flux": TINY["flux"],
    "qwen": TINY["qwen"],
    "lightning": TINY["qwen"],
    "hunyuan": TINY["hunyuan-video"],
    "sdxl": TINY["sdxl"],
    "schnell": Published(_FLOW, {}, "convert_lumina_to_diffusers.py"),
}

# Of pipelines that have no tiny form here.
OTHERS = {
    "Stable Diffusion 1.5": Published(
        "PNDMScheduler",
        _LATENT | {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1},
        _SINGLE,
    ),
    "BLIP-Diffusion": Published(
        "PNDMScheduler",
        _LATENT | {"set_alpha_to_one": False, "skip_prk_steps": True},
        "convert_blipdiffusion_to_diffusers.py",
    ),
    "Playground": Published("EDMDPMSolverMultistepScheduler", {"euler_at_final": False}, _SINGLE),
    "CogVideoX 5B": Published(
        _COGVIDEOX, _ZERO_SNR | {"snr_shift_scale": 1.0}, "convert_cogvideox_to_diffusers.py"
    ),
    "CogView3": Published(
        _COGVIDEOX, _ZERO_SNR | {"snr_shift_scale": 4.0}, "convert_cogview3_to_diffusers.py"
    ),
    "Mochi": Published(_FLOW, {"invert_sigmas": True}, "convert_mochi_to_diffusers.py"),
    "OmniGen": Published(
        _FLOW, {"invert_sigmas": True, "num_train_timesteps": 1}, "convert_omnigen_to_diffusers.py"
    ),
    "LongCat Audio": Published(
        _FLOW, {"shift": 1.0, "invert_sigmas": True}, "convert_longcat_audio_dit_to_diffusers.py"
    ),
    "Cosmos 1": Published(
        "EDMEulerScheduler",
        {"sigma_max": 80.0, "sigma_data": 0.5, "final_sigmas_type": "sigma_min"},
        "convert_cosmos_to_diffusers.py",
    ),
    "Cosmos 2": Published(_FLOW, {"use_karras_sigmas": True}, "convert_cosmos_to_diffusers.py"),
    "Cosmos 2.5": Published(
        _UNIPC,
        _FLOW_SIGMAS | {"use_karras_sigmas": True, "sigma_max": 200.0, "sigma_min": 0.01},
        "convert_cosmos_to_diffusers.py",
    ),
    "SkyReels-V2": Published(_UNIPC, _FLOW_SIGMAS, "convert_skyreelsv2_to_diffusers.py"),
    "Sana Sprint": Published(
        "SCMScheduler",
        {"prediction_type": "trigflow", "sigma_data": 0.5},
        "convert_sana_to_diffusers.py",
    ),
    "Sana Video": Published(
        _UNIPC, _FLOW_SIGMAS | {"flow_shift": 8.0}, "convert_sana_video_to_diffusers.py"
    ),
    "I2VGen-XL": Published(
        _DDIM,
        {
            "beta_schedule": "squaredcos_cap_v2",
            "rescale_betas_zero_snr": True,
            "clip_sample": False,
            "steps_offset": 1,
            "prediction_type": "v_prediction",
        },
        "convert_i2vgen_to_diffusers.py",
    ),
    "DeepFloyd IF": Published(
        "DDPMScheduler",
        {"variance_type": "learned_range", "beta_schedule": "squaredcos_cap_v2"},
        "convert_if.py",
    ),
    "UniDiffuser": Published(
        _DPM, _LATENT | {"solver_order": 3}, "convert_unidiffuser_to_diffusers.py"
    ),
    "GLIGEN": Published(
        _DDIM,
        _LATENT | {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False},
        "convert_gligen_to_diffusers.py",
    ),
    "Dance Diffusion": Published(
        "IPNDMScheduler", {"num_train_timesteps": 100}, "convert_dance_diffusion_to_diffusers.py"
    ),
    "consistency models": Published(
        "CMStochasticIterativeScheduler",
        {"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0},
        "convert_consistency_to_diffusers.py",
    ),
    "Karlo": Published(
        "UnCLIPScheduler",
        {"variance_type": "learned_range", "prediction_type": "epsilon"},
        "convert_kakao_brain_unclip_to_diffusers.py",
    ),
    "Stable Cascade": Published("DDPMWuerstchenScheduler", {}, "convert_stable_cascade.py"),
    "AnyFlow": Published(
        "FlowMapEulerDiscreteScheduler", {"shift": 5.0}, "convert_anyflow_to_diffusers.py"
    ),
    "ACE-Step": Published(
        _FLOW, {"num_train_timesteps": 1, "shift": 1.0}, "convert_ace_step_to_diffusers.py"
    ),
    "Stable Audio 3": Published(
        _FLOW,
        {"num_train_timesteps": 1, "shift": 1.0, "stochastic_sampling": True},
        "convert_stable_audio_3_to_diffusers.py",
    ),
    "VQ-Diffusion": Published(
        "VQDiffusionScheduler", {"num_vec_classes": 16}, "convert_vq_diffusion_to_diffusers.py"
    ),
    "aMUSEd": Published("AmusedScheduler", {"mask_token_id": 7}, "convert_amused.py"),
}
