"""Tensors that say `cuda:0` and are computed on the CPU.

What a GPU refuses is refused: an operation on tensors of two devices, NumPy on a device tensor, a
generator of another device. What makes the host wait for a GPU is noted with its place in the
source: values that are read, copies between host and device, indexing by a mask or by numbers that
lie on the host. `device.pretend_cuda` pretends what belongs to it: streams, graphs, kernels.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import lesa

HOST = torch.device("cpu")

# The host learns a value or a number of elements from them.
_READS = {
    "aten::_linalg_check_errors",
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_SOURCES = {
    package.__name__: f"{Path(str(package.__file__)).parent}/"
    for package in (lesa, diffusers, transformers)
}


class Read(NamedTuple):
    """The host waited for the device: for what, in whose code, and where."""

    kind: str
    owner: str
    place: str


class PretendTensor(torch.Tensor):
    """A tensor of a device that is not there; `held` are its values on the CPU.

    The methods below are those whose own form asks, under what a dispatch mode sees, for a device
    that a torch without CUDA does not know.
    """

    held: Tensor
    gpu: PretendGpu
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device, gpu: PretendGpu) -> PretendTensor:
        assert not isinstance(held, PretendTensor)
        with torch.inference_mode(held.is_inference()):  # so that it is what its values are
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                layout=held.layout,
                device=device,
            )
        made.held, made.gpu = held, gpu
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen: list[Tensor] = []
        held((args, kwargs), seen)
        gpu = next(tensor.gpu for tensor in seen if isinstance(tensor, PretendTensor))
        return gpu.run(func, args, kwargs or {})

    def __getitem__(self, index: Any) -> Tensor:
        self.gpu.check_indices(self, index)
        with _disable_current_modes():
            return PretendTensor(self.held[held(index)], self.device, self.gpu)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.gpu.check_indices(self, index, value)
        with _disable_current_modes():
            self.held[held(index)] = held(value)
        self._count_write()

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unbind(0))

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        done = self.is_contiguous(memory_format=memory_format)
        return self if done else self.clone(memory_format=memory_format)

    def copy_(self, source: Tensor, non_blocking: bool = False) -> PretendTensor:
        with _disable_current_modes():
            self.gpu.run(torch.ops.aten.copy_.default, (self, source, non_blocking), {})
        self._count_write()
        return self

    def nonzero(self) -> Tensor:
        return torch.ops.aten.nonzero.default(self)

    def _count_write(self) -> None:
        if not self.is_inference():  # which has no counter
            torch.autograd.graph.increment_version(self)

    def item(self) -> Any:
        self.gpu.note("value")
        return self.held.item()

    def tolist(self) -> Any:
        self.gpu.note("value")
        return self.held.tolist()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __index__(self) -> int:
        return self.item().__index__()

    def __int__(self) -> int:
        return int(self.item())

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> PretendTensor:
        copied = PretendTensor(self.held.clone(), self.device, self.gpu)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendTensor({self.held}, device={self.device})"


class PretendGpu(TorchDispatchMode):
    """The devices `cuda:0` and `cuda:1`; `device.pretend_cuda.pretend_gpu` makes them.

    Attributes:
        reads: each time that the host waited for a device.
        launches: of kernels, by name and device.
        current: index of the current device.
        has_float64: whether the devices have it, as CUDA does and MPS does not.
        tape: while a graph is recorded, what a replay has to do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[Read] = []
        self.launches: Counter[tuple[str, torch.device]] = Counter()
        self.current, self.has_float64 = 0, True
        self.tape: list[Callable[[], object]] | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import all of dynamo for it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def device(self, given: Any) -> torch.device:
        """With its index."""
        found = torch.device(given)
        if found.type == "cuda" and found.index in (None, -1):
            return torch.device("cuda", self.current)
        return found

    def note(self, kind: str) -> None:
        """The host waits now, which it must not do while a graph is recorded."""
        if self.tape is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing ({kind})")
        self.reads.append(Read(kind, *_place()))

    @contextmanager
    def watched(self, owner: str | None = None) -> Iterator[list[Read]]:
        """The reads inside, all or one owner's; filled when the block ends."""
        found: list[Read] = []
        begin = len(self.reads)
        yield found
        found += [read for read in self.reads[begin:] if owner in (None, read.owner)]

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operator, on whichever device its tensors lie."""
        if _is_composite(func):  # in inference mode these come whole
            with self:
                return func.decompose(*args, **kwargs)
        seen: list[Tensor] = []
        inner = [held(value, seen) for value in args]
        named = {name: held(value, seen) for name, value in kwargs.items()} if kwargs else kwargs
        asked = kwargs.get("device") if kwargs else None
        target = None if asked is None else self.device(asked)
        if target is not None and target.type == "cuda":
            named["device"] = HOST
        elif not any(isinstance(tensor, PretendTensor) for tensor in seen):
            return func(*args, **kwargs)
        where = self._placed(func, args, seen, target)
        generator = kwargs.get("generator") if kwargs else None
        if generator is not None and generator.device.type != where.type:
            raise RuntimeError(f"Expected a '{where.type}' device type for generator")
        found = func(*inner, **named)
        if self.tape is not None:
            self.tape.append(lambda: _renew(found, func(*inner, **named)))
        return self._outer(found, where, seen)

    def _outer(self, found: Any, where: torch.device, given: list[Tensor]) -> Any:
        """What an operator gave, as tensors of a device: what it wrote is what it was given."""
        if isinstance(found, (tuple, list)):
            return type(found)(self._outer(part, where, given) for part in found)
        if not isinstance(found, Tensor):
            return found
        for tensor in given:
            if isinstance(tensor, PretendTensor) and tensor.held is found:
                return tensor
        return self._wrapped(found, where)

    def _wrapped(self, values: Tensor, device: torch.device) -> Tensor:
        if device.type != "cuda":
            return values
        if values.dtype == torch.float64 and not self.has_float64:
            raise TypeError(f"{device} has no float64")
        return PretendTensor(values, device, self)

    def _placed(
        self, func: Any, args: Any, seen: list[Tensor], target: torch.device | None
    ) -> torch.device:
        """The device of what an operator gives; checks and notes what there is to it."""
        name = func._schema.name
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if name == "aten::copy_" else args[0]
            where = args[0].device if name == "aten::copy_" else target or source.device
            if source.device.type != where.type:
                self.note("copy to the host" if where.type == "cpu" else "copy to the device")
            return where
        devices = {tensor.device for tensor in seen if isinstance(tensor, PretendTensor)}
        if name in _INDEXING and args[0].device.type == "cuda":
            self.check_indices(args[0], args[1], *args[2:3])
            return args[0].device
        if len(devices) > 1 or not all(isinstance(tensor, PretendTensor) for tensor in seen):
            self._check_devices(func, name, seen, devices)
        if name in _READS:
            self.note("value")
        return target or next(iter(devices))

    def _check_devices(
        self, func: Any, name: str, seen: list[Tensor], devices: set[torch.device]
    ) -> None:
        strangers = [tensor for tensor in seen if not isinstance(tensor, PretendTensor)]
        if torch.Tag.pointwise in func.tags or name == "aten::fill_":  # which take host scalars
            strangers = [tensor for tensor in strangers if tensor.ndim]
        if strangers or len(devices) > 1:
            found = ", ".join(sorted({str(tensor.device) for tensor in seen}))
            raise RuntimeError(f"Expected all tensors on the same device, {name} got {found}")

    def check_indices(self, indexed: Tensor, index: Any, value: Any = None) -> None:
        """An index may lie on the host, and is copied; a mask tells how many elements there are."""
        parts = index if isinstance(index, (tuple, list)) else (index,)
        if isinstance(index, list) and not any(isinstance(part, Tensor) for part in index):
            parts = (index,)
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if any(isinstance(part, list) for part in parts) or any(t.is_cpu for t in tensors):
            self.note("index on the host")
        masks = [t for t in tensors if t.dtype in (torch.bool, torch.uint8)]
        filled = value is not None and (not isinstance(value, Tensor) or value.numel() == 1)
        if masks and not (filled and len(parts) == 1):
            self.note("index by a mask")
        for tensor in (*tensors, *([value] if isinstance(value, Tensor) else [])):
            if tensor.device not in (indexed.device, HOST):
                raise RuntimeError(
                    f"Expected all tensors on the same device, indexing got {tensor.device} for "
                    f"{indexed.device}"
                )


def constructors(gpu: PretendGpu) -> dict[Any, dict[str, Callable[..., Any]]]:
    """Owner -> name -> what stands in for a function that copies to a device below what a dispatch
    mode sees."""
    to, tensor = torch.Tensor.to, torch.tensor

    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return to(self, *map(with_index, args), **{k: with_index(v) for k, v in kwargs.items()})

    def with_index(value: Any) -> Any:
        named = isinstance(value, torch.device) or (isinstance(value, str) and value == "cuda")
        return gpu.device(value) if named else value

    def made(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def making(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            if isinstance(data, PretendTensor):
                return moved(data, device or data.device, **kwargs)
            if device is None:  # the one of a `with torch.device(...)` block, or of the data
                return make(data, *args, **kwargs)
            target = gpu.device(device)
            if target.type != "cuda":
                return make(data, *args, device=target, **kwargs)
            return moved(make(data, *args, device=HOST, **kwargs), target)

        return making

    def new_tensor(self: Tensor, data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        return made(tensor)(data, device=device or self.device, **{"dtype": self.dtype, **kwargs})

    of_torch = {name: made(getattr(torch, name)) for name in ("tensor", "as_tensor", "asarray")}
    return {torch: of_torch, torch.Tensor: {"to": moved, "new_tensor": new_tensor}}


def held(value: Any, seen: list[Tensor] | None = None) -> Any:
    """The CPU's side of a value, through tuples, lists and dicts; `seen` gets its tensors."""
    if isinstance(value, Tensor):
        if seen is not None:
            seen.append(value)
        return value.held if isinstance(value, PretendTensor) else value
    if value is None or isinstance(value, (int, float)):
        return value
    if isinstance(value, tuple):
        parts = [held(part, seen) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [held(part, seen) for part in value]
    if isinstance(value, dict):
        return {name: held(part, seen) for name, part in value.items()}
    return value


@cache
def _is_composite(func: Any) -> bool:
    name = func.name()
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def _renew(found: Any, again: Any) -> None:
    """Write what a repeated operator gave to where it was the first time."""
    before: list[Tensor] = []
    now: list[Tensor] = []
    held(found, before)
    held(again, now)
    for old, new in zip(before, now, strict=True):
        if old.data_ptr() != new.data_ptr():
            old.copy_(new)


def _place() -> tuple[str, str]:
    """Whose code is the innermost on the stack, and where it is."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        for owner, folder in _SOURCES.items():
            if path.startswith(folder):
                return owner, f"{path.removeprefix(folder)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "other", ""
