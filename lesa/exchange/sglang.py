"""Step lists as schedules of DPCache in SGLang: the file format sglang-dpcache-schedule-v2.

Read in sgl-project/sglang, python/sglang/multimodal_gen/runtime/cache/dpcache.py (Apache-2.0). A
server takes a schedule only for the very request that its field `request` names: pipeline,
checkpoint, steps, size, guidance, quality, attention backend, dtype, scheduler with the sha256 of
its config, time steps and sigmas. So these fields come from the server itself (a schedule or a
calibration capture that it wrote) or are given one by one; the list only fills in what it knows.
The sha256 in particular cannot be told from here: SGLang takes it over a list that diffusers makes
of a set, so that it may change from process to process where the config leaves fields out.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lesa._version import __version__
from lesa.core import schema
from lesa.errors import LesaError
from lesa.exchange.release import BROKEN
from lesa.exchange.step_lists import StepList
from lesa.forecasters.calibration import SIGMA_TOLERANCE
from lesa.util.files import named_path, one_line, read_file
from lesa.util.strict_json import parse_json, to_json

__all__ = ["FORMAT", "files", "read_request", "version"]

FORMAT = "sglang-dpcache-schedule-v2"
PREDICTOR = {
    "name": "final-feature-linear-extrapolation",
    "order": 1,
    "arithmetic": "feature-dtype-elementwise-v1",
}
OBJECTIVE = "pact-mean-abs-final-feature-predicted-steps-only-v1"  # the only one that is taken
MOST = 64 << 20  # bytes of a request's file; a capture of 100 steps has 8 MB
LEAD = (0, 1)  # a line needs two full steps
_GIVE = "give it in --request"
_NUMBERS = schema.items(schema.number(), 2, 100_001)
_REQUEST = schema.fields(
    {
        "pipeline": schema.text(),
        "checkpoint": schema.text(10_000),
        "num_inference_steps": schema.whole_number(2, 100_000),
        "height": schema.whole_number(1, 100_000),
        "width": schema.whole_number(1, 100_000),
        "guidance_scale": schema.number(),
        "do_classifier_free_guidance": schema.truth,
        "quality": schema.text(),
        "attention_backend": schema.maybe(schema.text()),
        "dtype": schema.choice("bfloat16"),
        "scheduler": schema.text(),
        "scheduler_config_sha256": schema.text(64),
        "timesteps": _NUMBERS,
        "sigmas": _NUMBERS,
    }
)
_FIELDS = (
    *("pipeline", "checkpoint", "num_inference_steps", "height", "width", "guidance_scale"),
    *("do_classifier_free_guidance", "quality", "attention_backend", "dtype", "scheduler"),
    *("scheduler_config_sha256", "timesteps", "sigmas"),
)


def version(wanted: str | None) -> str:
    """The format that is written; LesaError where another one is asked for, or the SGLang that is
    installed here reads another one."""
    number = FORMAT.rpartition("-")[2]
    if wanted is not None:
        if wanted not in (FORMAT, number, number[1:]):
            raise LesaError(
                f"engine-version={wanted!r}: schedules are written in {FORMAT} only; give "
                f"{number}, and a server that reads it"
            )
        return FORMAT
    found = installed_format()
    if found not in (None, FORMAT):
        raise LesaError(
            f"sglang={found!r}: the SGLang installed here reads other schedules than {FORMAT}; "
            f"install one that reads it, or give --engine-version {number} for another server"
        )
    return FORMAT


def installed_format() -> str | None:
    """What the SGLang of this environment reads, told from its source; None without SGLang, an
    empty text where it has no DPCache."""
    spec = find_spec("sglang")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        source = Path(folder) / "multimodal_gen" / "runtime" / "cache" / "dpcache.py"
        text = source.read_text(encoding="utf-8") if source.is_file() else ""
        told = re.search(r'^SCHEDULE_SCHEMA = "([\w.-]+)"', text, re.M)
        return told[1] if told else ""
    return None


def files(lists: Sequence[StepList], request: Mapping[str, Any]) -> dict[str, str]:
    """A schedule per list, named by its number of full steps.

    Raises: LesaError where two lists come to one number, or the request does not fit a list.
    """
    found: dict[str, str] = {}
    for one in lists:
        made = schedule(one, request)
        name = f"K{made['num_full_steps']}.json"
        if name in found:
            raise LesaError(
                f"full-steps={len(one.full_steps)}: with steps 0 and 1 in full it has as many as "
                f"another list ({name}), and SGLang takes one of each; choose with --full-steps"
            )
        found[name] = to_json(made)
    return found


def schedule(one: StepList, request: Mapping[str, Any]) -> dict[str, Any]:
    """One list in SGLang's format, with steps 0 and 1 in full, as its line needs two.

    `calibrated_cost`, which SGLang does not look at, is the sum over the forecast steps of the root
    mean square error of that line on the outputs of lesa's calibration, relative to the output.
    """
    full = sorted({*one.full_steps, *LEAD})
    gram, prompts = one.gram(), one.metadata.get("prompts_sha256")
    if gram is None or not isinstance(prompts, str):
        raise LesaError(
            "calibration=None: SGLang's schedule tells its cost on calibration prompts, and this "
            "forecaster keeps none; export one that lesa.train made (form continuous or table)"
        )
    return {
        "schema": FORMAT,
        "schedule_method": "lesa-search",
        "predictor": dict(PREDICTOR),
        "objective": OBJECTIVE,
        "source_commit": f"lesa-{__version__}",
        "request": _bound(one, request),
        "mandatory_full_steps": list(LEAD),
        "force_last_full": False,
        "max_gap": None,
        "num_full_steps": len(full),
        "full_steps": full,
        "calibrated_cost": line_cost(gram, full),
        "calibration": {
            "manifest_sha256": prompts,
            "num_samples": int(one.metadata.get("prompts") or 0),
            "cost": "sum of relative RMS errors of the line, on the model's outputs",
            "searched_full_steps": list(one.full_steps),
        },
    }


def line_cost(gram: Tensor, full: Sequence[int]) -> float:
    """sum_t |v_j + (v_j - v_i)(t - j)/(j - i) - v_t| / |v_t| over the steps t that are not full,
    i < j the last two full ones before t; norms from the inner products [S, S]."""
    total, known = 0.0, set(full)
    for step in range(len(gram)):
        if step in known:
            continue
        i, j = [s for s in full if s < step][-2:]
        slope = (step - j) / (j - i)
        weights = gram.new_zeros(len(gram))
        weights[i], weights[j], weights[step] = -slope, 1 + slope, -1.0
        error = float(weights @ gram @ weights)
        total += math.sqrt(max(error, 0.0) / float(gram[step, step]))
    return total


def read_request(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a request in a schedule (.json) or a calibration capture (.pt) of SGLang, or in
    a JSON object of them alone; LesaError for anything else."""
    name, remedy = named_path(path), "give a schedule or a capture that SGLang wrote"
    data = read_file(path, MOST, remedy)
    if data[:2] == b"PK":  # as torch.save writes
        try:
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except BROKEN as error:
            raise LesaError(f"{name} cannot be read ({one_line(error, 120)}); {remedy}") from None
        found = found.get("signature") if isinstance(found, Mapping) else None
    else:
        found = parse_json(data, f"{name} is not a request", remedy)
        found = found.get("request", found) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise LesaError(f"{name} holds no request; {remedy}")
    return {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()}


def _bound(one: StepList, request: Mapping[str, Any]) -> dict[str, Any]:
    """The 14 fields of a request; LesaError for one that is missing, wrong or of another run."""
    call = one.metadata.get("call") or {}
    levels = torch.tensor(one.entry.sigmas, dtype=torch.float32)
    own = {
        **{name: call[name] for name in ("height", "width", "guidance_scale") if name in call},
        "num_inference_steps": one.steps,
        "do_classifier_free_guidance": len(one.forecaster.branches) > 1,
        "dtype": "bfloat16",
        "timesteps": (levels[:-1] * 1000).tolist(),
        "sigmas": levels.tolist(),
    }
    if scheduler := one.metadata.get("scheduler"):
        own["scheduler"] = scheduler
    found = {**own, **request}
    if missing := [name for name in _FIELDS if name not in found]:
        raise LesaError(
            f"request: it lacks {', '.join(missing)}, to which SGLang binds a schedule; give "
            "--request: a schedule or capture that the server wrote, or a JSON with these fields"
        )
    if unknown := [name for name in found if name not in _FIELDS]:
        raise LesaError(f"request.{unknown[0]}: SGLang's requests have no such field; leave it out")
    schema.checked(found, _REQUEST, "request", _GIVE)
    _check_run(one, found)
    return {name: found[name] for name in _FIELDS}


def _check_run(one: StepList, found: Mapping[str, Any]) -> None:
    """LesaError unless the request is a run of the list's noise levels."""
    steps, sigmas, times = found["num_inference_steps"], found["sigmas"], found["timesteps"]
    if steps != one.steps or len(sigmas) != steps + 1 or len(times) != steps:
        raise LesaError(
            f"request.num_inference_steps={steps}: the list is of {one.steps} steps, with as many "
            "time steps and one more sigma; export one that was trained with that count"
        )
    if (away := one.entry.distance(sigmas)) > SIGMA_TOLERANCE:
        raise LesaError(
            f"request.sigmas: they differ from those of the list by {away:.3g}; export a "
            "forecaster that was trained with this scheduler and size"
        )
    call = one.metadata.get("call") or {}
    for name in ("height", "width"):
        if call.get(name) not in (None, found[name]):
            raise LesaError(
                f"request.{name}={found[name]}: the list was found at {call[name]}; export a "
                "forecaster that was trained at this size"
            )
    digest = found["scheduler_config_sha256"]
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise LesaError(
            f"request.scheduler_config_sha256={digest!r}: not 64 hexadecimal digits; {_GIVE}"
        )
