"""What a kernel is measured against, on the same tensors, and whether all of them are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import factorial
from typing import Any

import _formulas as formulas
import torch
from _suite import LIMIT, relative_error
from lesa_kernels.examples import Example, examples
from lesa_testbed import reference
from torch import Tensor

from lesa.ops import native

KERNELS = (
    "mix", "mix_modulate", "spline_mix", "gram", "mix_fp8", "push_fp8", "mix per channel"
)  # fmt: skip
SHAPES = {  # features in bf16 at batch 1
    "FLUX.1-dev 1024x1024, hidden": (1, 4096, 3072),
    "FLUX.1-dev 1024x1024, output": (1, 4096, 64),
    "Qwen-Image 1328x1328, hidden": (1, 6889, 3072),
    "Qwen-Image 1328x1328, output": (1, 6889, 64),
    "HunyuanVideo 720x1280x129, hidden": (1, 118800, 3072),
    "HunyuanVideo 720x1280x129, output": (1, 16, 33, 90, 160),
}
STEP = 1  # what `examples` puts into its step tensor
DISTANCE = 4  # steps since the last full one, for TaylorSeer
COPIES = ("copy", "copy kernel")
LIMITS = {"gram": 1e-5}
LOOSE = 2e-2  # for an update whose every term is rounded to bf16

Call = Callable[[], Any]
Arguments = dict[str, Any]


def kernels_at(place: str) -> tuple[str, ...]:
    """Those that make sense there: a norm and a modulation follow the hidden feature only."""
    return tuple(name for name in KERNELS if name != "mix_modulate" or place.endswith("hidden"))


def tensors(shape: tuple[int, ...], history: int, device: torch.device) -> dict[str, Example]:
    """One set of buffers; the fp8 ring is filled, since nothing is to be timed on zeros."""
    made = examples(shape, history, device=device)
    push = made["push_fp8"]
    for slot in range(history):
        at = torch.full((1,), slot, dtype=torch.int32, device=device)
        random = torch.randn_like(push.arguments["feature"])
        reference.push_fp8(random, push.arguments["ring"], push.arguments["scales"], at)
    return {name: made[name] for name in KERNELS}


def contenders(name: str, sets: Sequence[Example], compile: bool = True) -> dict[str, list[Call]]:
    """For every contender one call per set of buffers, each of which returns its result."""
    found: dict[str, list[Call]] = {"triton": [_launch(example) for example in sets]}
    if name in _NATIVE and native.load(sets[0].result.device.type):
        found["csrc"] = [_NATIVE[name](example.arguments) for example in sets]
    function, arguments = _FORMULAS[name]
    function = _narrowed(function, sets[0].arguments)
    found["eager"] = [_call(function, arguments(example.arguments)) for example in sets]
    if compile:
        torch._dynamo.reset()  # which gives up on a function after eight shapes
        fast = torch.compile(function, fullgraph=True, dynamic=False)
        found["torch.compile"] = [_call(fast, arguments(example.arguments)) for example in sets]
    if name == "mix":
        found["taylorseer"] = [
            _call(formulas.taylorseer, (_features(example.arguments), DISTANCE)) for example in sets
        ]
    return found | _copies(sets)


def check(name: str, example: Example, calls: dict[str, list[Call]]) -> dict[str, float]:
    """Relative errors ||out - exact|| / ||exact|| on the first set; SystemExit if one is wrong."""
    exact, errors = expected(name, example), {}
    for contender, (call, *_) in calls.items():
        if contender in COPIES:
            continue
        wanted = _taylorseer(example.arguments) if contender == "taylorseer" else exact
        _poison(example)
        found = _dense(call())
        errors[contender] = error = relative_error(found, wanted)
        limit = LOOSE if contender == "taylorseer" else LIMITS.get(name, LIMIT)
        if not error <= limit:  # NaN included
            raise SystemExit(
                f"{contender} {name} at {list(example.result.shape)} has a relative error of "
                f"{error:.1e}, over {limit:.0e}: nothing is timed on wrong results"
            )
    return errors


def expected(name: str, example: Example) -> Tensor:
    """What the kernel should write, float64."""
    arguments = dict(example.arguments)
    if name == "push_fp8":
        ring, scales = (torch.zeros_like(arguments[key][:1]) for key in ("ring", "scales"))
        reference.push_fp8(arguments["feature"], ring, scales, arguments["slot"] * 0)
        return _dense((ring[0], scales[0]))
    arguments["out"] = torch.empty_like(arguments["out"], dtype=torch.float64)
    return getattr(reference, example.launch.__name__)(**arguments)


def _poison(example: Example) -> None:
    """NaN wherever the kernel is to write."""
    if "slot" in example.arguments:
        slot = int(example.arguments["slot"])
        example.result[slot].view(torch.uint8).fill_(0x7F)  # of e4m3
        example.arguments["scales"][slot].fill_(torch.nan)
    else:
        example.result.fill_(torch.nan)


def _launch(example: Example) -> Call:
    arguments = example.arguments
    if "slot" not in arguments:
        return example.run
    at = int(arguments["slot"])

    def push() -> tuple[Tensor, Tensor]:
        example.run()
        return arguments["ring"][at], arguments["scales"][at]

    return push


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Call:
    return lambda: function(*arguments)


def _narrowed(function: Callable[..., Any], arguments: Arguments) -> Callable[..., Any]:
    """The formula, rounded to the dtype of the features where that is what it writes."""
    out = arguments.get("out")
    if out is None or out.dtype == torch.float64:
        return function
    dtype = out.dtype
    return lambda *given: function(*given).to(dtype)


def _features(arguments: Arguments) -> list[Tensor]:
    return [arguments["ring"][slot] for slot in arguments["slots"].tolist()]


def _row(arguments: Arguments) -> Tensor:
    return arguments["table" if "table" in arguments else "weights"][STEP].contiguous()


def _gate(arguments: Arguments) -> Any:
    """The gate of the expert of this step alone."""
    gate, expert = arguments["gate"], int(arguments["experts"][STEP])
    return gate._replace(
        **{name: getattr(gate, name)[expert : expert + 1] for name in gate._fields[:4]}
    )


_FORMULAS: dict[str, tuple[Callable[..., Any], Callable[[Arguments], tuple[Any, ...]]]] = {
    "mix": (formulas.mix, lambda a: (_features(a), _row(a))),
    "mix per channel": (formulas.mix, lambda a: (_features(a), _row(a))),
    "mix_modulate": (
        formulas.mix_modulate,
        lambda a: (_features(a), _row(a), a["scale"][STEP], a["shift"][STEP]),
    ),
    "spline_mix": (
        formulas.spline_mix,
        lambda a: (_features(a), _row(a), a["tau"][STEP], _gate(a), a["bias"][STEP]),
    ),
    "gram": (formulas.gram, lambda a: (a["feature"], [*_features(a), a["base"]])),
    "push_fp8": (formulas.push_fp8, lambda a: (a["feature"],)),
    "mix_fp8": (
        formulas.mix_fp8,
        lambda a: (_features(a), [a["scales"][slot] for slot in a["slots"].tolist()], _row(a)),
    ),
}


def _native_mix(a: Arguments) -> Call:
    operator, row = torch.ops.lesa_native.mix_out.default, _row(a)
    return lambda: (
        operator(a["ring"], a["slots"], row, None, 0.0, 0.0, a["out"]), a["out"]
    )[1]  # fmt: skip


def _native_mix_modulate(a: Arguments) -> Call:
    operator, row = torch.ops.lesa_native.mix_modulate_out.default, _row(a)
    scale, shift = a["scale"][STEP], a["shift"][STEP]
    return lambda: (
        operator(a["ring"], a["slots"], row, 0.0, scale, shift, 1e-6, a["out"], None), a["out"]
    )[1]  # fmt: skip


_NATIVE: dict[str, Callable[[Arguments], Call]] = {
    "mix": _native_mix,
    "mix_modulate": _native_mix_modulate,
}


def _copies(sets: Sequence[Example]) -> dict[str, list[Call]]:
    """As many bytes as the kernel moves, half read and half written, by two kinds of copy."""
    size = sets[0].nbytes // 2 // 16 * 8  # int16, whole vectors
    device = sets[0].result.device
    pairs = [
        [torch.randint(-(2**15), 2**15, (size,), dtype=torch.int16, device=device) for _ in "ab"]
        for _ in sets
    ]
    return {
        "copy": [_call(target.copy_, (source,)) for source, target in pairs],
        "copy kernel": [_copy_kernel(source, target) for source, target in pairs],
    }


def _copy_kernel(source: Tensor, target: Tensor) -> Call:
    """An elementwise kernel instead of the driver's copy."""
    return lambda: torch.bitwise_not(source, out=target)


def _taylorseer(arguments: Arguments) -> Tensor:
    terms = enumerate(_features(arguments))
    return sum(f.double() * DISTANCE**i / factorial(i) for i, f in terms)


def _dense(found: Any) -> Tensor:
    """A result in float64; codes with their scales are decoded."""
    if isinstance(found, Tensor):
        return found.double()
    codes, scales = found
    return codes.double() * scales.double().view(*codes.shape[:-1], 1)
