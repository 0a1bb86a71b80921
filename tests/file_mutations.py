"""Files as a disk, a network or an enemy leaves them: random changes of bytes, JSON and tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import torch
from safetensors.torch import load, save

Tensors = dict[str, torch.Tensor]

DEEP = "deep"  # stands for nesting that json.dumps itself cannot write
_DEEP_TEXT = "[" * 100_000 + "]" * 100_000
VALUES: dict[str, list[Any]] = {
    "wrong type": [None, True, "text", [], {}, [[]], {"a": 1}, 1.5, -1, "", ["x"], [None]],
    "huge": [10**30, -(10**30), 1e308, 10**9, "x" * 100_000, [0] * 100_000, [10**30]],
    "not a number": [float("nan"), float("inf"), float("-inf"), [float("nan")] * 3],
    "odd text": ["\ud800", "\x1b[31m", "a\nb", "[/red]", "\x00", "../../x", "$x^$", "\u202e"],
    "deep": [DEEP],
}


def bytes_changed(random: Random, data: bytes) -> tuple[str, bytes]:
    """Bytes flipped, cut off, put in, or in another place."""
    kind = random.choice(("flipped", "truncated", "inserted", "zeroed", "swapped", "empty"))
    at, length = random.randrange(len(data)), random.randint(1, 64)
    changed = bytearray(data)
    match kind:
        case "flipped":
            for _ in range(random.choice((1, 3, 50))):
                changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
        case "truncated":
            del changed[at:]
        case "inserted":
            changed[at:at] = random.randbytes(length)
        case "zeroed":
            changed[at : at + length] = bytes(length)
        case "swapped":
            changed = changed[at:] + changed[:at]
        case "empty":
            changed.clear()
    return f"bytes {kind}", bytes(changed)


def json_changed(random: Random, text: str) -> tuple[str, str]:
    """A value replaced, a key taken away or one put in, anywhere in a JSON object."""
    content = json.loads(text)
    holder, key = random.choice([*_places(content)])
    kind = random.choice([*VALUES, *VALUES, "missing", "unknown key", "moved"])
    if kind == "missing":
        del holder[key]
    elif kind == "unknown key":
        target = holder if isinstance(holder, dict) else content
        target[random.choice(("extra", "__class__", "\ud800", "a b"))] = 1
    elif kind == "moved":
        other, place = random.choice([*_places(content)])
        holder[key] = json.loads(json.dumps(other[place]))
    else:
        holder[key] = random.choice(VALUES[kind])
    return f"JSON {kind}", json.dumps(content).replace(f'"{DEEP}"', _DEEP_TEXT)


def tensors_changed(random: Random, data: bytes) -> tuple[str, bytes]:
    """A tensor missing, of another dtype or shape, or with values that no training gives."""
    tensors = load(data)
    name = random.choice([*tensors])
    kind = random.choice([*_TENSORS, "missing", "extra", "renamed"])
    if kind == "missing":
        del tensors[name]
    elif kind == "extra":
        tensors["rows.99.cond"] = tensors[name].clone()
    elif kind == "renamed":
        tensors[name + "x"] = tensors.pop(name)
    else:
        tensors[name] = _TENSORS[kind](random, tensors[name].clone()).contiguous()
    return f"tensor {kind}", save(tensors, metadata=_metadata(data))


def header_changed(random: Random, data: bytes) -> tuple[str, bytes]:
    """The header of a safetensors file, its metadata included, with its length made right."""
    size = int.from_bytes(data[:8], "little")
    kind, header = json_changed(random, data[8 : 8 + size].decode())
    text = header.encode(errors="surrogatepass")
    return f"header {kind}", len(text).to_bytes(8, "little") + text + data[8 + size :]


def metadata_changed(random: Random, data: bytes, field: str) -> tuple[str, bytes]:
    """The JSON that a field of the metadata holds, in a file that is otherwise well made."""
    metadata = _metadata(data)
    kind, metadata[field] = json_changed(random, metadata[field])
    return f"metadata {kind}", save(load(data), metadata=metadata)


def _metadata(data: bytes) -> dict[str, str] | None:
    size = int.from_bytes(data[:8], "little")
    found: dict[str, str] | None = json.loads(data[8 : 8 + size]).get("__metadata__")
    return found


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    keys: Any = value if isinstance(value, dict) else ()
    if isinstance(value, list):
        keys = range(len(value))
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _one(random: Random, tensor: torch.Tensor, value: float) -> torch.Tensor:
    """One element, or all of them, replaced."""
    if not tensor.numel():
        return tensor
    where = slice(None) if random.random() < 0.3 else random.randrange(tensor.numel())
    tensor.view(-1)[where] = value
    return tensor


_TENSORS: dict[str, Callable[[Random, torch.Tensor], torch.Tensor]] = {
    "other dtype": lambda random, t: t.to(
        random.choice((torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float64))
    ),
    "other shape": lambda random, t: random.choice(
        (
            t[:-1] if t.ndim else t[None],
            t[None],
            t.flatten(),
            torch.cat([t[None]] * 2),
            t.new_empty(0),
        )
    ),
    "NaN": lambda random, t: _one(random, t, float("nan")),
    "inf": lambda random, t: _one(random, t, float("inf")),
    "1e30": lambda random, t: _one(random, t, 1e30),
    "negated": lambda random, t: -t,
    "zero": lambda random, t: torch.zeros_like(t),
}
