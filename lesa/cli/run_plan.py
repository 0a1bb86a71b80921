"""What `lesa train` says before it loads a pipeline: the plan, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lesa.cli.output import say
from lesa.cli.plan import Plan, check_fits, cost_of, memory_of
from lesa.errors import LesaError

if TYPE_CHECKING:
    from lesa.cli.requests import TrainRequest

__all__ = ["check_memory", "print_plan"]

COUNTED = ("continuous", "table")  # forms whose cost a budget knows
ASIDE = ("told", "device_bytes")  # fields of a preparation that are none of its measures


def print_plan(
    request: TrainRequest,
    settings: dict[str, Any],
    steps: Sequence[int],
    full_steps: Sequence[int],
    prompts: int,
    judging: int,
    console: Console,
) -> dict[str, Any]:
    """Print what the training would take; nothing is loaded or written.

    Raises: LesaError for a plan that is impossible, or a form whose cost is not known.
    """
    if request.form not in COUNTED:
        raise LesaError(
            f"form={request.form!r}: a plan knows what {' and '.join(COUNTED)} cost; leave"
            " --dry-run out"
        )
    from lesa.cli.full_step import check_name
    from lesa.cli.inputs import named_device

    if request.device is not None:
        named_device(request.device)  # the plan may be for another machine
    if request.attention_backend is not None:
        check_name(request.attention_backend)
    recipe = request.recipe
    cost = cost_of(request.allowed, request.step_seconds, steps, full_steps, prompts, judging)
    measures = {
        name: value
        for name, value in asdict(recipe.preparation).items()
        if value and value != "none" and name not in ASIDE
    }
    more: dict[str, Any] = {"notes": ["rows and bytes, without a recipe that has a model"]}
    if recipe.model is not None:
        found = _measure(request, settings)
        memory = memory_of(recipe, found, prompts, steps)
        if (limit := recipe.preparation.device_bytes) is not None:
            told, offload = recipe.preparation.told, recipe.preparation.offload
            check_fits(told, memory, request.batch_size, offload, limit, "memory.device")
        cost = cost.of_model(found)
        notes = ["operations: its forward looks at values"] * (found.flops is None)
        more = {"parameters": found.parameters, "branches": found.rows, "memory": memory}
        more["notes"] = notes
    plan = Plan(
        recipe.title, recipe.licence, request.named, _dtype_name(request), settings, steps,
        full_steps, prompts, judging, request.batch_size, measures, cost, **more,
    )  # fmt: skip
    for name, text in plan.lines().items():
        say(console, f"{name:<14} {text}")
    return asdict(plan)


def check_memory(
    request: TrainRequest, settings: dict[str, Any], pictures: int, steps: Sequence[int]
) -> None:
    """LesaError, before any weight is loaded, where what the recipe tells of the model does not fit
    into the device that is there."""
    recipe = request.recipe
    if recipe.model is None:
        return
    import psutil  # of accelerate
    import torch

    from lesa.cli.inputs import check_target

    device, _ = check_target(request.named, request.device, request.dtype)
    if device.type == "cuda":
        limit = torch.cuda.get_device_properties(device).total_memory
    else:
        limit = psutil.virtual_memory().total
    offload = "none" if device.type == "cpu" else recipe.preparation.offload
    memory = memory_of(recipe, _measure(request, settings), pictures, steps)
    check_fits(recipe.preparation.told, memory, request.batch_size, offload, limit, str(device))


def _measure(request: TrainRequest, settings: dict[str, Any]) -> Any:
    import torch

    from lesa.cli.inputs import quieten
    from lesa.cli.meta_run import measure

    quieten()
    assert request.recipe.model is not None
    return measure(request.recipe.model, settings, getattr(torch, _dtype_name(request)))


def _dtype_name(request: TrainRequest) -> str:
    """The dtype that is asked for; without one, that of the device that is there."""
    from lesa.cli.inputs import check_dtype, check_target

    if request.dtype is not None:
        return check_dtype(request.dtype)
    return str(check_target(request.named, request.device, None)[1]).removeprefix("torch.")
