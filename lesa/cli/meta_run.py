"""A pipeline's own loop on a denoiser without weights: what a step is given, returns and costs.

The denoiser is of its real class, on the meta device, where tensors have shapes and no values; the
pipeline and its scheduler run on the CPU, on latents of the real size, for a few steps.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from lesa.cli.published import Published
from lesa.cli.rehearsal import begin, check_levels
from lesa.errors import LesaError
from lesa.hooks.model_specs import model_spec

__all__ = ["Measured", "measure"]

_PROMPT = re.compile(r"(negative_)?prompt(_\d)?")
MOST_MODULES = 30_000  # the largest published ones have some thousands
STEPS = 2  # of the loop that is run: where there are two denoisers, one each


@dataclass
class Measured:
    """What is known of a model and of one step of one picture, over all guidance branches.

    Attributes:
        dtype: of the weights and of the embeddings.
        parameters: of a denoiser.
        rows: of the denoiser that a step computes: its guidance branches.
        flops: of a step in full; None where the denoiser's forward looks at values.
        latent_bytes, output_bytes: of what the denoiser is given and returns in a step, summed
            over its calls.
        argument_bytes: of a row, all arguments of a call.
    """

    dtype: torch.dtype
    parameters: int = 0
    rows: int = 0
    flops: int | None = 0
    latent_bytes: int = 0
    output_bytes: int = 0
    argument_bytes: int = 0

    @property
    def feature_bytes(self) -> int:
        """Of a row that is cached at the output tap."""
        return self.output_bytes // max(1, self.rows)


def measure(model: Published, settings: Mapping[str, Any], dtype: torch.dtype) -> Measured:
    """Run `STEPS` steps of the pipeline as it would be called, and say what one of them is.

    settings: arguments of `pipe(...)`.

    Raises: LesaError for classes and configurations that do not fit together, or arguments that
        the pipeline refuses or training could not follow.
    """
    model.check_fields()
    try:
        with torch.device("meta"), _bounded(model):
            denoiser = model.kind(model.denoiser)(**model.config)
        denoiser = denoiser.to(dtype).requires_grad_(False).eval()
        found = Measured(dtype, _count(denoiser))
        _check_blocks(model, denoiser)
        pipe = _pipeline(model, denoiser)
        arguments = _arguments(model, settings, dtype)
        begin(pipe, {**arguments, **_steps(settings)}, settings)
        check_levels(pipe, settings)
        with _recorded(denoiser, found), torch.no_grad():
            pipe(**arguments)
    except LesaError:
        raise
    except Exception as error:  # what a class does with a wrong configuration may be anything
        reason = " ".join(str(error).split())[:200].rstrip(" .") or type(error).__name__
        raise LesaError(
            f"{model.told}: model: {model.pipeline} cannot be run without weights ({reason});"
            " correct its configuration, or the arguments of the call"
        ) from error
    for name in ("rows", "latent_bytes", "output_bytes"):
        if not getattr(found, name):
            raise LesaError(
                f"{model.told}: model: a step of {model.denoiser} has no {name.replace('_', ' ')};"
                " correct its configuration"
            )
        setattr(found, name, getattr(found, name) // STEPS)
    return replace(found, flops=None if found.flops is None else found.flops // STEPS)


def _steps(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The number of them that was asked for."""
    return {n: settings[n] for n in ("num_inference_steps",) if n in settings}


@contextmanager
def _bounded(model: Published) -> Iterator[None]:
    """Ends the making of a denoiser that has more modules than any, which would take hours."""
    made = 0

    def count(_: nn.Module, name: str, __: nn.Module) -> None:
        nonlocal made
        made += 1
        if made > MOST_MODULES:
            raise LesaError(
                f"{model.told}: model.config: {model.denoiser} would have more than"
                f" {MOST_MODULES} modules with it; correct its numbers of layers"
            )

    watch = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        watch.remove()


def _check_blocks(model: Published, denoiser: nn.Module) -> None:
    """LesaError for a denoiser that has no block to step over."""
    for path in model_spec(denoiser).blocks:
        with suppress(AttributeError):
            if any(True for _ in denoiser.get_submodule(path).children()):
                return
    raise LesaError(
        f"{model.told}: model.config: {model.denoiser} has no block with it; give its numbers of"
        " layers"
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _pipeline(model: Published, denoiser: nn.Module) -> Any:
    """The pipeline without what encodes prompts, on the CPU in its own eyes."""
    kind = model.kind(model.pipeline)
    here = type(kind.__name__, (kind,), {"_execution_device": torch.device("cpu")})
    parts: dict[str, Any] = {
        "scheduler": model.kind(model.scheduler)(**model.scheduler_config),
        "unet" if "UNet" in model.denoiser else "transformer": denoiser,
        **({"transformer_2": denoiser} if model.denoisers > 1 else {}),
        **model.arguments,
    }
    for name, part in model.parts.items():
        config = model.parts_config.get(name, {})
        with torch.device("meta"):
            parts[name] = model.kind(part)(**config)
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name != "self" and parameter.default is inspect.Parameter.empty:
            parts.setdefault(name, None)
    pipe = here(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _arguments(model: Published, settings: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Of the call: settings, and embeddings of the published shapes in the place of prompts."""
    made = {
        name: torch.ones(1, *shape, dtype=torch.long)
        if "mask" in name
        else torch.zeros(1, *shape, dtype=dtype)
        for name, shape in model.text.items()
    }
    given = {name: v for name, v in settings.items() if not _PROMPT.fullmatch(name)}
    more = {"num_inference_steps": STEPS, "output_type": "latent"}
    return {**given, **more, **made, "generator": torch.Generator().manual_seed(0)}


@contextmanager
def _recorded(denoiser: nn.Module, found: Measured) -> Iterator[None]:
    """Every call of the denoiser runs on the meta device, is counted, and returns zeros."""
    numbers = _shortened(denoiser)
    own = denoiser.forward
    latent_name = model_spec(denoiser).latent
    seen: dict[str, tuple[int | None, Any]] = {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        key = str([(leaf.shape, leaf.dtype) for leaf in _tensors((args, kwargs))])
        latent: Any = kwargs.get(latent_name, args[0] if args else None)
        if key not in seen:
            there = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
            denoiser.forward = own
            seen[key] = _counted(denoiser, there[0], there[1], numbers) or (
                None, _by_channels(denoiser, latent, kwargs)
            )  # fmt: skip
            denoiser.forward = forward
        flops, output = seen[key]
        rows = len(latent)
        found.rows += rows
        found.flops = None if flops is None or found.flops is None else found.flops + flops
        found.latent_bytes += latent[:1].nbytes
        found.output_bytes += sum(leaf.nbytes for leaf in _tensors(output))
        of_rows = [leaf for leaf in _tensors((args, kwargs)) if leaf.ndim and len(leaf) == rows]
        each = sum(leaf.nbytes // rows for leaf in of_rows)
        found.argument_bytes = max(found.argument_bytes, each)
        return tree_map_only(Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), output)

    denoiser.forward = forward
    try:
        yield
    finally:
        del denoiser.forward


def _counted(
    denoiser: nn.Module, args: Any, kwargs: Mapping[str, Any], numbers: Mapping[str, int]
) -> tuple[int, Any] | None:
    """Operations of a call, with the one block that is left of each container counted as often as
    there were, and what it returns; None where the forward asks for values."""
    counter = FlopCounterMode(display=False)
    try:
        with torch.device("meta"), counter:
            output = denoiser(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, NotImplementedError) or "meta tensor" in str(error).lower():
            return None
        raise
    by_module, total = counter.get_flop_counts(), counter.get_total_flops()
    for blocks, number in numbers.items():
        one = by_module[f"{type(denoiser).__name__}.{blocks}.0"]
        total += (number - 1) * sum(one.values())
    return total, output


def _by_channels(denoiser: nn.Module, latent: Tensor, kwargs: Mapping[str, Any]) -> Any:
    """What a denoiser of pictures or videos ``[rows, channels, ...]`` returns: as many channels as
    its configuration says."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    config: Any = denoiser.config
    output = latent.new_zeros(len(latent), config.out_channels, *latent.shape[2:])
    return Transformer2DModelOutput(output) if kwargs.get("return_dict", True) else (output,)


def _shortened(denoiser: nn.Module) -> dict[str, int]:
    """Leave one block in each container whose blocks are alike; how many there were."""
    numbers = {}
    for path in model_spec(denoiser).blocks:
        with suppress(AttributeError):
            container = denoiser.get_submodule(path)
            sizes = {(type(block), _count(block)) for block in container.children()}
            if len(sizes) == 1 and len(container) > 1:  # type: ignore[arg-type]
                numbers[path] = len(container)  # type: ignore[arg-type]
                del container[1:]  # type: ignore[operator]
    return numbers


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
