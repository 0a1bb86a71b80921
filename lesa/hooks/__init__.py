"""All that touches diffusers: finding, hooking and timing a denoiser."""
