"""What makes a full step itself faster: diffusers' attention backends, and compiled blocks.

Both are diffusers' own; here they are listed, checked before any work is done, and switched on for
a command. In Python `pipe.transformer.set_attention_backend(...)` and
`pipe.transformer.compile_repeated_blocks()` do the same, before or after `lesa.enable`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from lesa.errors import LesaError, is_out_of_memory

__all__ = [
    "FullStep",
    "attention_backends",
    "check_name",
    "compile_blocks",
    "set_attention",
    "why_not",
]

_PROBE = (1, 16, 2, 64)  # [B, L, H, D]: a head size that every backend takes
COMPILE: dict[str, Any] = {}  # options of torch.compile
_COUNTED = "native"  # what torch's counter of operations sees: PyTorch's own attention


@cache
def attention_backends(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """diffusers' attention backends by name: why not usable on a device, empty where usable."""
    return {name: why_not(name, device, dtype) for name in _names()}


def why_not(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Why an attention backend of diffusers cannot be used, empty where it can.

    Its package is looked for and a small attention computed, unless its kernel lies on the hub.
    """
    from diffusers import attention_backend
    from diffusers.models import attention_dispatch as dispatch

    backend = dispatch.AttentionBackendName(name)
    try:
        dispatch._check_attention_backend_requirements(backend)
        if backend in getattr(dispatch, "_HUB_KERNELS_REGISTRY", {}):
            return ""
        probe = torch.zeros(_PROBE, device=device, dtype=dtype)
        with attention_backend(backend), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # advice on how to make it faster
            dispatch.dispatch_attention_fn(probe, probe, probe)
    except Exception as error:  # each backend has its own way of refusing
        return _sentence(error)
    return ""


@dataclass(frozen=True)
class FullStep:
    """What a command was told to switch on; nothing by default."""

    attention_backend: str | None = None
    compile: bool = False

    def check(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Before any work: LesaError unless the attention backend and torch.compile work here."""
        if self.attention_backend is not None:
            _check_attention(self.attention_backend, device, dtype)
        if self.compile:
            _check_compiler(device)

    def apply(self, pipe: Any) -> None:
        """Switch it on for the pipeline's denoisers; LesaError where one cannot have it."""
        if self.attention_backend is not None:
            set_attention(pipe, self.attention_backend)
        if self.compile:
            compile_blocks(pipe)

    def warm_up(self, pipe: Any, prompts: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Two steps of a first batch, if anything is on: no timing holds a compilation.

        Raises: LesaError if the denoiser cannot run with it: a mask, a dtype or a head size.
        """
        if self == FullStep():
            return
        from lesa.hooks.timed_run import generate

        short = {**settings, "num_inference_steps": 2, "output_type": "latent"}
        try:
            generate(pipe, prompts, range(len(prompts)), short)
        except Exception as error:  # what a compiler or a kernel refuses may be anything
            if isinstance(error, LesaError) or is_out_of_memory(error):
                raise
            raise LesaError(
                f"{self.fields()}: {type(pipe).__name__} cannot run with it here "
                f"({_sentence(error)}); choose another or leave it out"
            ) from error

    def notes(self) -> list[str]:
        """What a comparison should say of it."""
        if self == FullStep():
            return []
        found = [f"All runs with {self}"]
        if _COUNTED not in (self.attention_backend or _COUNTED):
            found.append(f"TFLOPs leave out the attention of {self.attention_backend!r}")
        return found

    def fields(self) -> str:
        """What is switched on, as errors name it: "attention-backend='flash', compile=True"."""
        named = [f"attention-backend={self.attention_backend!r}"] * bool(self.attention_backend)
        return ", ".join([*named, *["compile=True"] * self.compile])

    def __str__(self) -> str:
        named = [f"attention-backend {self.attention_backend!r}"] * bool(self.attention_backend)
        return " and ".join([*named, *["compile"] * self.compile])


def set_attention(pipe: Any, name: str) -> None:
    """The attention backend of the pipeline's denoisers.

    Raises: LesaError if it cannot be set, or the denoiser's layers of attention take none.
    """
    for model in _models(pipe):
        processors = (getattr(module, "processor", None) for module in model.modules())
        if not any(hasattr(processor, "_attention_backend") for processor in processors):
            raise LesaError(
                f"attention-backend={name!r}: it has no effect on {type(model).__name__}, whose "
                "layers do not take one in this diffusers; leave it out"
            )
        try:
            model.set_attention_backend(name)  # fetches a kernel of the hub
        except Exception as error:
            raise LesaError(
                f"attention-backend={name!r}: it cannot be set ({_sentence(error)}); choose another"
            ) from None


def compile_blocks(pipe: Any) -> None:
    """Compile the repeated blocks of the pipeline's denoisers, with the options `COMPILE`.

    Where diffusers names none of a class, those that lesa steps over are taken.
    """
    from lesa.hooks.model_specs import model_spec

    # By default dynamo does not see hooks that come later, such as those of `lesa compare`'s peers.
    if hasattr(torch._dynamo.config, "skip_nnmodule_hook_guards"):
        torch._dynamo.config.skip_nnmodule_hook_guards = False
    for model in _models(pipe):
        if getattr(model, "_repeated_blocks", None):
            model.compile_repeated_blocks(**COMPILE)
            continue
        for container in model_spec(model).blocks:
            for block in model.get_submodule(container).children():
                block.compile(**COMPILE)


def check_name(name: str) -> None:
    """LesaError for an attention backend that diffusers does not have."""
    if name not in _names():
        listed = ", ".join(_names())
        raise LesaError(f"attention-backend={name!r}: unknown; choose from {listed}")


def _check_attention(name: str, device: str, dtype: torch.dtype) -> None:
    check_name(name)
    if reason := why_not(name, device, dtype):
        kind = str(dtype).removeprefix("torch.")
        raise LesaError(
            f"attention-backend={name!r}: not usable on {device} in {kind} ({reason}); "
            "choose one that `lesa env` lists as usable"
        )


@cache
def _names() -> tuple[str, ...]:
    from diffusers.models.attention_dispatch import AttentionBackendName

    return tuple(backend.value for backend in AttentionBackendName)


def _models(pipe: Any) -> list[Any]:
    from lesa.hooks.pipeline import find_denoisers
    from lesa.hooks.wrappers import core_of

    return [core_of(model) for model in find_denoisers(pipe)]


def _check_compiler(device: str) -> None:
    """LesaError unless torch.compile can make a kernel for the device."""
    try:
        torch.compile(lambda x: x * 2 + 1, **COMPILE)(torch.zeros(8, device=device))
    except Exception as error:  # a missing compiler, Triton, header, ...
        raise LesaError(
            f"compile=True: torch.compile does not work on {device} ({_sentence(error)}); "
            "leave --compile out"
        ) from None


def _sentence(error: BaseException) -> str:
    """The first line of a reason; diffusers puts the backend's name in front of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = (lines or [type(error).__name__])[0].replace("`", "")
    return first.split("is not usable because ")[-1].removeprefix("of ")[:200].rstrip(" .:")
