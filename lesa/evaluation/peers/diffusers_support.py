"""Where the caches of diffusers can run: reasons against a pipeline, or None."""

from __future__ import annotations

import inspect
from typing import Any

from lesa.evaluation.method import Bench
from lesa.evaluation.peers.metering import blocks_of


def uncacheable(bench: Bench) -> str | None:
    """Why `enable_cache` cannot be called, or None."""
    if hasattr(getattr(bench.pipe, "transformer", None), "enable_cache"):
        return None
    return (
        f"needs a transformer with enable_cache, {type(bench.pipe).__name__} has none; leave it out"
    )


def unknown_blocks(bench: Bench) -> str | None:
    """Why the hooks on blocks cannot be applied, or None."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    blocks = blocks_of(bench.pipe.transformer)
    if len(blocks) < 2:
        return f"needs two blocks, the transformer has {len(blocks)}; leave it out"
    for kind in {type(block) for block in blocks}:
        try:
            TransformerBlockRegistry.get(kind)
        except ValueError:
            return f"needs blocks that diffusers' caches know, not {kind.__name__}; leave it out"
    return None


def nameless_calls(bench: Bench) -> str | None:
    """Why states by guidance branch cannot be kept, or None: the pipeline's loop has to name the
    branch of each call."""
    for kind in type(bench.pipe).__mro__:
        call: Any = inspect.unwrap(vars(kind).get("__call__", kind))
        if "cache_context" in getattr(getattr(call, "__code__", None), "co_names", ()):
            return None
    return (
        f"needs a pipeline that enters cache_context, {type(bench.pipe).__name__} does not; "
        "leave it out"
    )


def silent_pipeline(bench: Bench) -> str | None:
    """SeaCache reads the step and its noise level, which few pipelines pass to the model."""
    model = type(bench.pipe.transformer).__name__
    if model in ("WanTransformer3DModel", "Cosmos3OmniTransformer"):
        return None
    return f"needs a pipeline that passes noise levels (Wan, Cosmos 3), not one of {model}"
