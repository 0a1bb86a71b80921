"""The model card of a forecaster: what training recorded of it, in the Hub's form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lesa._version import __version__
from lesa.errors import LesaError
from lesa.forecasters.calibration import Calibration
from lesa.forecasters.settings import Settings
from lesa.forecasters.worth import speedup

__all__ = ["base_model_of", "card"]

_TRAINED = {
    "model_class": "denoiser",
    "model_id": "pipeline",
    "scheduler": "scheduler",
    "prompts": "prompts",
    "seed": "seed of the first prompt",
    "converted_from": "converted from",
    "release": "of the release",
}
_COLUMNS = ("full steps", "faster", "PSNR mean", "p10", "min", "LPIPS mean", "max", "pictures")


class Trained(Protocol):
    """What a card tells of."""

    settings: Settings
    calibrations: list[Calibration]
    metadata: dict[str, Any]

    @property
    def name(self) -> str: ...


def card(
    forecaster: Trained,
    repo_id: str,
    *,
    license: str = "other",
    base_model: str | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """The README.md of a repository: its metadata, how to use it, what its lists are worth, where
    it comes from.

    Args:
        forecaster: of which its settings, its calibrated lists and its metadata are told.
        repo_id: where it can be loaded from.
        license: an identifier of the Hub, such as "mit"; "other" says that none was named.
        base_model: the Hub id of the pipeline it was trained for, where the metadata has none.
        pictures: paths in the repository.

    Raises: LesaError for a license or a base model that the Hub takes for none.
    """
    if not isinstance(license, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise LesaError(f"license={license!r}: not an identifier of the Hub; give one such as mit")
    base = base_model_of(forecaster) if base_model is None else base_model
    if base is not None and not _is_id(base):
        raise LesaError(f"base_model={base!r}: not the id of a Hub repository; give owner/name")
    parts = [
        _head(forecaster, license, base),
        _what(forecaster, base),
        _use(forecaster, repo_id, base),
        _worth(forecaster.calibrations),
        "".join(f"![{_title(path)}]({path})\n\n" for path in pictures),
        _origin(forecaster.metadata),
        "" if license != "other" else "No licence was named when this was uploaded.\n",
    ]
    return "\n".join(part.rstrip() + "\n" for part in parts if part)


def base_model_of(forecaster: Trained) -> str | None:
    """The Hub id of the pipeline that training ran; None where it was a folder."""
    named = str(forecaster.metadata.get("model_id") or "")
    return named if _is_id(named) else None


def _is_id(text: Any) -> bool:
    return isinstance(text, str) and bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", text))


def _head(forecaster: Trained, license: str, base: str | None) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter",
        license=license,
        license_name="unnamed" if license == "other" else None,
        library_name="lesa",
        tags=["lesa", "diffusers", "feature-caching", forecaster.name],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _what(forecaster: Trained, base: str | None) -> str:
    of = base or forecaster.metadata.get("model_id") or forecaster.metadata.get("model_class")
    return (
        f"# A lesa forecaster{f' for {_plain(of)}' if of else ''}\n\n"
        "The denoiser runs on a few steps; the others are forecast from the cached outputs of\n"
        "those, with the coefficients in this repository. It holds no weights of the pipeline."
    )


def _use(forecaster: Trained, repo_id: str, base: str | None) -> str:
    """A program that can be run as it stands."""
    entries = forecaster.calibrations
    counts = sorted({len(entry.schedule.full_steps) for entry in entries})
    given = f", full_steps={counts[len(counts) // 2]}" if counts else ""
    steps = f", num_inference_steps={entries[0].schedule.steps}" if entries else ""
    return (
        "## Use\n\n```python\nimport lesa, torch\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{base or "the pipeline"}", '
        'dtype=torch.bfloat16).to("cuda")\n'
        f'lesa.enable(pipe, "{repo_id}"{given})\n'
        f'image = pipe("a red fox in the snow"{steps}).images[0]\n```'
    )


def _worth(entries: Sequence[Calibration]) -> str:
    """The calibration table, a dash for what was not measured."""
    if not entries:
        return ""
    rows = [f"| {' | '.join(_COLUMNS)} |", f"| {' | '.join(['---'] * len(_COLUMNS))} |"]
    rows += [f"| {' | '.join(_cells(entry))} |" for entry in entries]
    told = ["PSNR in dB and LPIPS against the plain run of the same seeds."]
    worths = [entry.worth for entry in entries]
    if any(worth is not None and not worth.validated for worth in worths):
        told.append("*own*: prompts that it was fitted to, so that others may come out worse.")
    timed = [worth is not None and worth.share is not None for worth in worths]
    where = "" if all(timed) else ", where it was not timed as if a skipped step took no time"
    told.append(f"*faster*: predicted, of the denoising{where}.")
    lists = "\n".join(f"- {_count(entry)}: {_steps(entry)}" for entry in entries)
    body = "\n".join(rows)
    return f"## What it is worth\n\n{body}\n\n{' '.join(told)}\n\nThe full steps:\n\n{lists}"


def _cells(entry: Calibration) -> list[str]:
    worth, schedule = entry.worth, entry.schedule
    share = None if worth is None else worth.share
    cells = [_count(entry), f"{speedup(entry.mean_full_steps, schedule.steps, share):.2f}x"]
    if worth is None:
        return [*cells, *["-"] * (len(_COLUMNS) - 2)]
    cells += [f"{value:.1f}" for value in (worth.mean, worth.p10, worth.minimum)]
    far = (worth.lpips_mean, worth.lpips_max)
    cells += ["-" if value is None else f"{value:.3f}" for value in far]
    return [*cells, f"{worth.pictures}" + ("" if worth.validated else " own")]


def _count(entry: Calibration) -> str:
    return f"{len(entry.schedule.full_steps)} of {entry.schedule.steps}"


def _steps(entry: Calibration) -> str:
    """The full steps of a list, and those of a picture at risk."""
    told, guard = ", ".join(map(str, entry.schedule.full_steps)), entry.guard
    if guard is None:
        return told
    return (
        f"{told}; of a picture whose features change by more than {guard.limit:.3g} of their size "
        f"up to step {guard.step}, as {guard.share:.0%} did: "
        f"{', '.join(map(str, guard.schedule.full_steps))}"
    )


def _origin(metadata: Mapping[str, Any]) -> str:
    lines = [
        f"- {told}: {_plain(metadata[name])}"
        for name, told in _TRAINED.items()
        if metadata.get(name) not in (None, "")
    ]
    call = metadata.get("call")
    if isinstance(call, Mapping) and call:
        listed = ", ".join(f"{_plain(name)}={_plain(value)}" for name, value in call.items())
        lines.append(f"- call: {listed}")
    return "## Where it comes from\n\n" + "\n".join([*lines, f"- written by lesa {__version__}"])


def _title(path: str) -> str:
    return path.rpartition("/")[2].rpartition(".")[0].replace("-", " ")


def _plain(value: Any) -> str:
    """A value of the metadata in one line, without what Markdown or HTML would obey."""
    text = " ".join(str(value).split())[:300]
    return re.sub(r"([\\`*{}\[\]<>|#])", r"\\\1", text)
