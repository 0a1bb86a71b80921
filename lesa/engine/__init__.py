"""Runs tables: one call of the denoiser is full or skipped."""
