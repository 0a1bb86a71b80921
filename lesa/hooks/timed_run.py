"""One timed run of a pipeline: pictures, the latent after every step, seconds of the loop."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lesa.hooks.prompt_inputs import prompt_arguments


@dataclass
class Run:
    """Pictures [N, C, H, W] (videos [N, F, C, H, W]) in [0, 1] on the CPU, and their making."""

    images: Tensor
    seconds: float
    latents: list[Tensor] = field(default_factory=list)
    cpu_seconds: float = 0.0


class LoopBar:
    """Stands in for `pipe.progress_bar`, which every diffusers loop enters, updates and leaves.

    `seconds` covers the denoising loop alone, without text encoders and decoder, and `cpu_seconds`
    what this process computed meanwhile, all its threads together. `mark` is called where the loop
    begins and after every step, `on_step` after every step.
    """

    def __init__(
        self,
        device: torch.device,
        mark: Callable[[], None] | None = None,
        on_step: Callable[[], object] = lambda: None,
    ) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self._device = device
        self._mark, self._on_step = mark or (lambda: None), on_step
        self._iterable: Iterable[Any] = ()

    def __call__(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> LoopBar:
        self._iterable = iterable if iterable is not None else range(total or 0)
        return self

    def __enter__(self) -> LoopBar:
        self._synchronise()
        self._mark()
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self._synchronise()
        self.seconds += time.perf_counter() - self._start[0]
        self.cpu_seconds += time.process_time() - self._start[1]

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self._iterable:
                yield item
                self.update()

    def update(self, n: int = 1) -> None:
        """A step has ended."""
        self._mark()
        self._on_step()

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()


@contextmanager
def loop_bar(
    pipe: Any,
    mark: Callable[[], None] | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> Iterator[LoopBar]:
    """Replace `pipe.progress_bar` for a while; what was there is back afterwards."""
    bar = LoopBar(torch.device(getattr(pipe, "_execution_device", "cpu")), mark, on_step)
    own = vars(pipe).get("progress_bar")  # of whoever shows another bar; else the class has one
    pipe.progress_bar = bar
    try:
        yield bar
    finally:
        del pipe.progress_bar
        if own is not None:
            pipe.progress_bar = own


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per picture: it does not depend on the batch that it is made in."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def generate(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    *,
    record: bool = False,
    on_step: Callable[[], object] = lambda: None,
) -> Run:
    """Run the pipeline on the prompts, one seed per picture; `record` keeps the latent after every
    step, `on_step` is called there.

    `settings` are arguments of `pipe(...)`, num_inference_steps among them; with `prompt_embeds`
    (one row per prompt) the prompts are titles.
    """
    latents: list[Tensor] = []
    own = prompt_arguments(prompts, settings, range(len(prompts)))
    arguments = {"output_type": "pt", **own, "generator": generators(seeds)}
    if record and "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:

        def keep(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            latents.append(tensors["latents"].clone())
            return tensors

        arguments |= {
            "callback_on_step_end": keep,
            "callback_on_step_end_tensor_inputs": ["latents"],
        }
    with torch.no_grad(), loop_bar(pipe, on_step=on_step) as bar:
        images = pipe(return_dict=False, **arguments)[0]
    return Run(images.float().cpu(), bar.seconds, latents, bar.cpu_seconds)
