"""Whether this machine can run the rest: device, copy rate, one mix, one captured graph."""

from __future__ import annotations

import json

import torch
from _environment import environment
from _suite import LIMIT, copy_seconds, relative_error

from lesa import ops

SHAPE, HISTORY, STEPS = (1, 4096, 3072), 3, 50
MIB = 1 << 20


def main() -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    print(json.dumps(environment(device), default=str, indent=1))
    moved = (2048 if cuda else 32) * MIB  # read and written
    print(f"copy: {moved / copy_seconds(moved, device) / 1e9:.0f} GB/s")
    error = mix_error(device, SHAPE if cuda else (1, 64, 48))
    print(f"mix: relative error {error:.1e}")
    if not error < LIMIT:
        raise SystemExit("the mix is wrong on this device")
    if cuda:
        print(f"graph: largest difference {captured(device):.1e}")


def mix_error(device: torch.device, shape: tuple[int, ...]) -> float:
    """||out - exact|| / ||exact|| of one mix in bf16."""
    ring, slots, table, step = _inputs(device, shape)
    out = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=device)
    ops.mix(ring, slots, table, step, out)
    row = table[int(step)].double()
    exact = sum(weight * ring[slot].double() for weight, slot in zip(row, slots, strict=True))
    return relative_error(out, exact)


def captured(device: torch.device) -> float:
    """The largest difference between a replayed mix and a launched one."""
    ring, slots, table, step = _inputs(device, SHAPE)
    launched, replayed = (torch.empty_like(ring[0]) for _ in range(2))
    ops.mix(ring, slots, table, step, launched)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.mix(ring, slots, table, step, replayed)
    graph.replay()
    torch.cuda.synchronize()
    return float((launched - replayed).abs().max())


def _inputs(device: torch.device, shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator(device).manual_seed(0)
    ring = torch.randn((HISTORY, *shape), generator=draw, device=device, dtype=torch.bfloat16)
    slots = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
    table = torch.randn(STEPS, HISTORY, generator=draw, device=device)
    return ring, slots, table, torch.full((1,), 7, dtype=torch.int32, device=device)


if __name__ == "__main__":
    main()
