"""What a user names on the command line, turned into objects, or into one clear sentence."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lesa.cli.names import choose, did_you_mean
from lesa.cli.schedulers import set_scheduler
from lesa.core.schedule import check_count
from lesa.errors import LesaError, is_out_of_memory

if TYPE_CHECKING:
    from lesa.cli.full_step import FullStep
    from lesa.cli.preparation import Preparation

# What diffusers imports where it is installed, and tells of its optional parts.
_TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")
TESTBED, NOT_EMBEDDED = "testbed", "not embedded"
DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "half": "float16",
    "float32": "float32",
}


def load_pipeline(
    name: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    scheduler: str | None = None,
    full_step: FullStep | None = None,
    preparation: Preparation | None = None,
) -> Any:
    """A pipeline from a folder or a hub id, or an embedded one (see `embedded_name`).

    Without `device` CUDA is taken where there is any. Without `dtype` it is bfloat16 on CUDA and
    float32 elsewhere; the embedded pipeline is always float32. `scheduler` is
    one of `lesa.cli.schedulers`; `full_step` is switched on, and `preparation` is a recipe's.

    Raises: LesaError if it cannot be loaded or lesa does not know its denoiser.
    """
    from lesa.hooks.model_specs import model_spec
    from lesa.hooks.pipeline import find_denoiser

    quieten()
    target, wanted = check_target(name, device, dtype)
    if (embedded := embedded_name(name)) is not None:
        from lesa import testbed

        pipe = testbed.load(embedded)
    else:
        pipe = _from_pretrained(name, wanted)
    model_spec(find_denoiser(pipe))
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(target) if preparation is None else preparation.place(pipe, target)
    if scheduler is not None:
        set_scheduler(pipe, scheduler)
    if preparation is not None:
        preparation.set_scheduler(pipe)
    if full_step is not None:
        full_step.apply(pipe)
    return pipe


def check_target(
    name: str, device: str | None, dtype: str | None, full_step: FullStep | None = None
) -> tuple[Any, Any]:
    """The device and the dtype that `load_pipeline` takes, before anything is loaded or written.

    Raises: LesaError if the device is not there, the dtype is unknown, or what `full_step` asks for
        does not work with them.
    """
    given = None if dtype is None else _dtype(dtype)
    target = _device(device or default_device())
    wanted = given or _dtype("bfloat16" if target.type == "cuda" else "float32")
    if embedded_name(name) is not None:
        wanted = _dtype("float32")
    if full_step is not None:
        quieten()
        full_step.check(str(target), wanted)
    return target, wanted


def default_device() -> str:
    """CUDA where there is any, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def embedded_name(name: str) -> str | None:
    """The embedded pipeline that is meant: "testbed" (the first one), "testbed:qwen" or "qwen".

    None for everything else, which is a folder or a hub id.

    Raises: LesaError for "testbed:" with a name that is not embedded.
    """
    from lesa import testbed

    if name == TESTBED:
        return testbed.PIPELINES[0]
    inner = name.removeprefix(f"{TESTBED}:")
    if inner in testbed.PIPELINES:
        return inner
    if inner != name:
        choose(inner, testbed.PIPELINES, "pipeline", what=NOT_EMBEDDED)
    return None


def parse_counts(
    text: str, num_steps: int | None = None, field: str = "full-steps"
) -> tuple[int, ...]:
    """ "13,10,8" -> (13, 10, 8); LesaError unless each is at least 1, at most `num_steps`, and
    there once."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise LesaError(
            f"{field}={text!r}: not a list of whole numbers; write 10 or 13,10,8"
        ) from None
    for count in counts:
        check_count(count, num_steps or max(count, 1), field)
        if counts.count(count) > 1:
            raise LesaError(f"{field}={text!r}: {count} is there twice; give each number once")
    return counts


def load_forecaster(name: str) -> Any:
    """A trained forecaster from a folder or hub id, or a training-free one by its method's name.

    Raises: LesaError for a name that is none of them, or what cannot be read.
    """
    from lesa.forecasters.named import named

    return named(name)


def quieten() -> None:
    """Loading bars and advice of the libraries below would drown the command's own words."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _from_pretrained(name: str, dtype: Any) -> Any:
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(name, dtype=dtype)
    except MemoryError:
        raise
    except Exception as error:  # every kind of broken folder raises something else
        raise LesaError(
            f"pipeline={name!r}: cannot load it ({first_line(error)}); give a folder saved with"
            f" save_pretrained, a hub id, or {TESTBED}"
        ) from error


def named_device(name: str) -> Any:
    """The device of a name, whether it is here or not; LesaError for a name that torch has not."""
    import torch

    try:
        return torch.device(name)
    except RuntimeError:
        near = did_you_mean(name, ["cpu", "cuda", "mps", "xpu"])
        raise LesaError(f"device={name!r}: unknown{near}; give one of: {_devices()}") from None


def _device(name: str) -> Any:
    """The device, once a number was written to it and read: some, such as meta, hold none."""
    import torch

    device = named_device(name)
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        reason = first_line(error)  # torch asserts when it has no CUDA
        raise LesaError(
            f"device={name!r}: not usable here ({reason}); give one of: {_devices()}"
        ) from None
    return device


def _devices() -> str:
    """The devices that are there."""
    import torch

    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ", ".join(["cpu", *found, *["mps"] * torch.backends.mps.is_available()])


def check_dtype(name: str) -> str:
    """The name of a dtype as torch has it: "bf16" -> "bfloat16"; LesaError for an unknown one."""
    return DTYPES[choose(name.removeprefix("torch."), DTYPES, "dtype")]


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, check_dtype(name))


def first_line(error: BaseException) -> str:
    """The first sentence of an error's text, or its class, without a full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0][:200].rstrip(" .:")
