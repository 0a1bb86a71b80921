"""A skipped step as a CUDA graph."""
