"""A comparison as one file that others can check: who measured what, on what, and what came out.

Described by docs/result.schema.json (JSON Schema 2020-12). `VERSION` grows when a reader of the old
one could misread the new one; fields that are only added leave it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from lesa.evaluation.comparison import Comparison
from lesa.hooks.weights_hash import weights_hash
from lesa.ops import backend
from lesa.util import machine
from lesa.util.source import Source
from lesa.util.versions import versions

__all__ = ["NAME", "VERSION", "Subject", "document", "prompts_hash"]

NAME, VERSION = "lesa-result", 1


@dataclass(frozen=True)
class Subject:
    """What is measured, as it is known before anything runs.

    Attributes:
        source: the lesa that measures.
        pipeline: "testbed:flux", a hub id or the name of a folder.
        recipe: its name, the sha256 of its file, and which of its options others were given for;
            None without one.
        options: what the comparison was asked for besides.
        calibration: prompts that methods were prepared on.
        forecaster: its name and the sha256 of its files, None without one.
    """

    source: Source
    pipeline: str
    recipe: Mapping[str, Any] | None
    options: Mapping[str, Any]
    batch_size: int
    calibration: Sequence[str] = ()
    forecaster: Mapping[str, Any] | None = None


def document(subject: Subject, pipe: Any, result: Comparison) -> dict[str, Any]:
    """The file's content, as plain values."""
    whole = result.to_dict()
    device = torch.device(getattr(pipe, "_execution_device", "cpu"))
    plain = {"peak_bytes": None, **whole["plain"]}
    return {
        "schema": NAME,
        "version": VERSION,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "source": vars(subject.source),
        "environment": _environment(device),
        "recipe": subject.recipe,
        "pipeline": _pipeline(subject.pipeline, pipe),
        "scheduler": _scheduler(pipe.scheduler),
        "call": whole["settings"],
        "options": dict(subject.options),
        "forecaster": subject.forecaster,
        "prompts": _texts(result.prompts),
        "calibration": _texts(subject.calibration) if subject.calibration else None,
        "seed": result.seed,
        "batch_size": subject.batch_size,
        "pairs": len(result.titles),
        "plain": {key: plain[key] for key in ("seconds", "cpu_seconds", "tflops", "peak_bytes")},
        "process_peak_bytes": machine.peak_bytes(),
        "missing": _missing(result, device),
        "rows": [_row(row) for row in result.rows],
        "notes": result.notes,
    }


def prompts_hash(prompts: Sequence[str]) -> str:
    """The sha256 of the prompts as a JSON list in UTF-8, with ", " between them."""
    return hashlib.sha256(json.dumps([*prompts], ensure_ascii=False).encode()).hexdigest()


def _texts(prompts: Sequence[str]) -> dict[str, Any]:
    return {"count": len(prompts), "sha256": prompts_hash(prompts)}


def _environment(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else machine.processor()
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": {"type": device.type, "name": name},
        "cuda": torch.version.cuda if cuda else None,
        "processor": machine.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": machine.load(),
        "backend": backend.active(device),
    }


def _pipeline(name: str, pipe: Any) -> dict[str, Any]:
    """What is called, and a hash of every part's weights that the dtype does not change."""
    parts = {
        key: part for key, part in pipe.components.items() if isinstance(part, torch.nn.Module)
    }
    return {
        "name": name,
        "class": type(pipe).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "weights": {key: weights_hash(part) for key, part in parts.items()},
    }


def _scheduler(scheduler: Any) -> dict[str, Any]:
    """The class, and a hash of all that it was made with."""
    config = json.dumps(dict(scheduler.config), sort_keys=True, default=str)
    found = hashlib.sha256(f"{type(scheduler).__name__} {config}".encode()).hexdigest()
    return {"class": type(scheduler).__name__, "sha256": found}


def _missing(result: Comparison, device: torch.device) -> dict[str, str]:
    """Field of a row -> why it is null everywhere."""
    found = {} if result.lpips_missing is None else {"lpips": result.lpips_missing}
    if device.type != "cuda":
        found["peak_bytes"] = f"{device.type} does not count it per run; see process_peak_bytes"
    return found


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    """One method at one number of full steps."""
    same = ("label", "method", "full_steps", "schedule")
    more = ("ssim_mean", "seconds", "cpu_seconds", "speedup", "tflops", "cache_bytes")
    return {
        **{key: row[key] for key in same},
        "full_step_list": row.get("full_step_list"),
        "psnr": {
            "mean": row["psnr_mean"],
            "p10": row["psnr_p10"],
            "minimum": row["psnr_min"],
            "mean_interval": row["psnr_mean_interval"],
            "p10_interval": row["psnr_p10_interval"],
            "each": row["psnr"],
        },
        "lpips": (
            {"mean": row["lpips_mean"], "max": row["lpips_max"]} if "lpips_mean" in row else None
        ),
        **{key: row[key] for key in more},
        "peak_bytes": row.get("peak_bytes"),
    }
