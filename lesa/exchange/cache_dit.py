"""Step lists as configurations of cache-dit: its mask of steps, with the static policy.

cache-dit (https://github.com/vipshop/cache-dit, Apache-2.0) then runs the first block at every
step and adds the stored residual of the others at a step whose mask is 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Any

from lesa._version import __version__
from lesa.errors import LesaError
from lesa.exchange.step_lists import StepList

__all__ = ["SERIES", "files", "version"]

SERIES = "1.5"  # whose fields these are
NEVER = 1e9  # a threshold that no change of a residual reaches; the mask alone decides


def version(wanted: str | None) -> str:
    """The version of cache-dit that is written for: the given one, else the one installed here,
    else the last one that is known; LesaError where that has other fields."""
    found, where = wanted, "engine-version"
    if found is None:
        try:
            found, where = installed("cache-dit"), "cache-dit"
        except PackageNotFoundError:
            return SERIES
    if not re.fullmatch(rf"{re.escape(SERIES)}(?!\d)[\w.+]*", found):
        raise LesaError(
            f"{where}={found!r}: masks are written for cache-dit {SERIES}; install 'cache-dit>="
            f"{SERIES},<1.6' where they are read, and give --engine-version {SERIES}"
        )
    return found


def files(lists: Sequence[StepList], request: Mapping[str, Any]) -> dict[str, str]:
    """A YAML file per list, for `cache_dit.enable_cache(pipe, **cache_dit.load_configs(file))`."""
    return {f"cache-dit-{one.name}.yaml": _text(one) for one in lists}


def config(one: StepList) -> dict[str, Any]:
    """The fields of its DBCacheConfig; guidance by a call of its own is two branches here."""
    full = set(one.full_steps)
    return {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "max_warmup_steps": 0,
        "residual_diff_threshold": NEVER,
        "enable_separate_cfg": len(one.forecaster.branches) > 1,
        "num_inference_steps": one.steps,
        "steps_computation_mask": [int(step in full) for step in range(one.steps)],
        "steps_computation_policy": "static",
    }


def _text(one: StepList) -> str:
    model = one.metadata.get("model_class") or "a model that is not named"
    head = (
        f"# {one.name.replace('-', ' ')} steps in full, found for {model} by lesa {__version__}.\n"
        "# The mask holds the steps only: cache-dit reuses where lesa mixes by coefficients.\n"
    )
    fields = (f"  {name}: {json.dumps(value)}\n" for name, value in config(one).items())
    return f"{head}cache_config:\n{''.join(fields)}"
