"""Launches on the device of their tensors, and prepared ones that check nothing twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from lesa_kernels import config

__all__ = ["GRID_Y", "Launch", "Prepared", "on_device"]

HERE: AbstractContextManager[None] = nullcontext()
GRID_Y = 65_535  # CUDA's limit of a grid's second number; the first goes to 2^31 - 1
ALIGNMENT = 16  # bytes: what Triton specialises a pointer for


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one; costs nothing where it is, or where it is none."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return HERE
    return torch.cuda.device(device)


class Launch(NamedTuple):
    """A kernel with all that it is launched with, checked; `constants` are its last parameters.

    `registers` is the most that a thread may have: to the assembler also a leave to use that many
    for loads in flight. 0 leaves it to its own idea of how many programs should be resident.
    """

    kernel: Any
    grid: tuple[int, ...]
    device: torch.device
    warps: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    registers: int = 0

    def run(self) -> Any:
        """On its device's current stream; the compiled kernel, or None from the interpreter."""
        options = {"num_warps": self.warps}
        if self.registers and config.LANES == 32:  # AMD's compiler has no such option
            options["maxnreg"] = self.registers
        with on_device(self.device):
            return self.kernel[self.grid](*self.arguments, **self.constants, **options)


class Ready(NamedTuple):
    """What a direct launch needs: none of the tensors that vary is among it."""

    forms: list[Any]
    direct: Callable[..., Any]
    device: torch.device
    arguments: list[Any]
    places: list[tuple[int, bool, bool]]  # of each tensor: which argument, aligned, written
    begin: int  # where a result that begins before `end` may overlap the ring
    end: int


class Prepared:
    """A launch that is repeated with other tensors of the same form: `prepared(*tensors)`.

    The first call of a form (shapes, strides, dtypes and device) is checked and launched as usual;
    those that follow go to the compiled function, with nothing but the new addresses. Where that
    would not hold - another form, an address off 16 bytes, a result inside the ring - or cannot
    be - the interpreter, another Triton - the call is checked and launched as usual again.

    Args:
        plan: makes the launch from the tensors, or None where there is nothing to do; raises
            LesaError. It keeps alive what the launch shares with the next ones.
        ring: what no result may overlap unseen.
        names: the kernel's parameters that the tensors are.
        results: those of them that are written.
    """

    def __init__(
        self,
        plan: Callable[..., Launch | None],
        ring: Tensor,
        names: tuple[str, ...],
        results: tuple[str, ...] = ("out",),
    ) -> None:
        self._plan, self._names, self._results = plan, names, results
        self._ring = (ring.data_ptr(), ring.data_ptr() + ring.numel() * ring.element_size())
        self._ready: Ready | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        ready = self._ready
        if ready is None or ready.forms != [_form(tensor) for tensor in tensors]:
            return self._checked(tensors)
        arguments, odd = ready.arguments.copy(), 0
        for tensor, (place, aligned, written) in zip(tensors, ready.places, strict=True):
            if tensor is None:
                continue
            address = arguments[place] = tensor.data_ptr()
            if aligned:
                odd |= address
            if written and ready.begin < address < ready.end:
                return self._checked(tensors)
        if odd % ALIGNMENT:
            return self._checked(tensors)
        with on_device(ready.device):
            stream = driver.active.get_current_stream(ready.device.index)
            ready.direct(*arguments, stream=stream)

    def _checked(self, tensors: tuple[Tensor | None, ...]) -> None:
        launch = self._plan(*tensors)
        if launch is not None:
            compiled = launch.run()
            self._ready = self._made_ready(launch, compiled, tensors) or self._ready

    def _made_ready(
        self, launch: Launch, compiled: Any, tensors: tuple[Tensor | None, ...]
    ) -> Ready | None:
        direct = _direct(compiled, launch.grid)
        if direct is None:
            return None
        parameters = {parameter.name: parameter for parameter in launch.kernel.params}
        places, begin = [], self._ring[0]
        for name, tensor in zip(self._names, tensors, strict=False):
            aligned = not parameters[name].do_not_specialize_on_alignment
            if tensor is not None and aligned and tensor.data_ptr() % ALIGNMENT:
                return None  # compiled for addresses that the next call hardly has
            written = name in self._results
            if written and tensor is not None:
                begin = min(begin, self._ring[0] - tensor.numel() * tensor.element_size())
            places.append((parameters[name].num, aligned, written))
        constants = [launch.constants[name] for name in parameters if name in launch.constants]
        given = (*launch.arguments, *constants)
        arguments = [x.data_ptr() if isinstance(x, Tensor) else x for x in given]
        forms = [_form(tensor) for tensor in tensors]
        return Ready(forms, direct, launch.device, arguments, places, begin, self._ring[1])


def _form(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _direct(compiled: Any, grid: tuple[int, ...]) -> Callable[..., Any] | None:
    """The compiled kernel as a function of all its parameters and a stream, where it is one.

    Not on HIP: there the code also depends on whether a tensor's memory passes 2 GB.
    """
    if torch.version.hip or not hasattr(compiled, "__getitem__"):
        return None
    direct = compiled[(*grid, 1, 1)[:3]]
    return direct if "stream" in inspect.signature(direct).parameters else None
