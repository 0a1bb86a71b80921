"""What a user names on the command line, turned into objects, or into one clear sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lesa.core.schedule import check_count
from lesa.errors import LesaError, is_out_of_memory

if TYPE_CHECKING:
    from lesa.cli.full_step import FullStep

TESTBED = "testbed"


def load_pipeline(
    name: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    full_step: FullStep | None = None,
) -> Any:
    """A pipeline from a folder or a hub id, or an embedded one (see `embedded_name`).

    Without `device` CUDA is taken where there is any. Without `dtype` it is bfloat16 on CUDA and
    float32 elsewhere; the embedded pipeline is always float32. `full_step` is switched on.

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
    pipe = pipe.to(target)
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
    target = _device(device or default_device())
    wanted = _dtype(dtype or ("bfloat16" if target.type == "cuda" else "float32"))
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
        listed = ", ".join(testbed.PIPELINES)
        raise LesaError(f"pipeline={inner!r}: not embedded; choose from {listed}")
    return None


def call_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for `pipe(...)`: the given ones that are not None, over the embedded pipeline's."""
    base: dict[str, Any] = {"num_inference_steps": 50}
    if (embedded := embedded_name(name)) is not None:
        from lesa import testbed

        base |= testbed.settings(embedded)
    return base | {key: value for key, value in given.items() if value is not None}


def parse_counts(
    text: str, num_steps: int | None = None, field: str = "full-steps"
) -> tuple[int, ...]:
    """ "13,10,8" -> (13, 10, 8); LesaError unless each is at least 1, at most `num_steps`."""
    try:
        counts = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        counts = ()
    if not counts:
        raise LesaError(f"{field}={text!r}: not a list of whole numbers; write 10 or 13,10,8")
    for count in counts:
        check_count(count, num_steps or max(count, 1), field)
    return tuple(dict.fromkeys(counts))


def load_forecaster(name: str) -> Any:
    """A trained forecaster from a folder or hub id, or a training-free one by its method's name."""
    from lesa.forecasters.lesa import LesaForecaster
    from lesa.forecasters.published import METHODS, canonical

    if (method := canonical(name)) in METHODS:
        return METHODS[method]()

    return LesaForecaster.from_pretrained(name)


def quieten() -> None:
    """Loading bars and advice of the libraries below would drown the command's own words."""
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
            f"pipeline={name!r}: cannot load it ({_first_line(error)}); give a folder saved with"
            f" save_pretrained, a hub id, or {TESTBED}"
        ) from error


def _device(name: str) -> Any:
    """The device, once a number was written to it and read: some, such as meta, hold none."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise LesaError(f"device={name!r}: unknown; give one of: {_devices()}") from None
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        reason = _first_line(error)  # torch asserts when it has no CUDA
        raise LesaError(
            f"device={name!r}: not usable here ({reason}); give one of: {_devices()}"
        ) from None
    return device


def _devices() -> str:
    """The devices that are there."""
    import torch

    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ", ".join(["cpu", *found, *["mps"] * torch.backends.mps.is_available()])


def _dtype(name: str) -> Any:
    import torch

    known = {"float32", "bfloat16", "float16"}
    if name not in known:
        raise LesaError(f"dtype={name!r}: unknown; choose from {', '.join(sorted(known))}")
    return getattr(torch, name)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(" .:")
