"""What can be said about the kernels without a GPU: bytes, and the machine code that they become.

Nothing here was run on a device, and every row says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch
from _contenders import KERNELS, SHAPES, kernels_at
from _environment import ROOT, environment
from lesa_kernels.examples import examples

COMPILED = "compiled, not run"
COUNTED = "counted, not measured"


def analysis() -> dict[str, Any]:
    """Bytes of every kernel and shape at K = 3, and the compiled code for every target."""
    return {
        "environment": environment(),
        "note": "no GPU was used: bytes are counted from the tensors, code is compiled and read",
        "bytes": moved(),
        "code": machine_code(),
    }


def moved(history: int = 3) -> list[dict[str, Any]]:
    """Bytes that each kernel must read and write at least."""
    rows = []
    for place, shape in SHAPES.items():
        made = examples(shape, history, device="meta")
        for name in kernels_at(place):
            rows.append(
                {
                    "kernel": name,
                    "place": place,
                    "shape": list(shape),
                    "history": history,
                    "dtype": "bfloat16",
                    "bytes": made[name].nbytes,
                    "kind": COUNTED,
                }
            )
    return rows


def machine_code() -> list[dict[str, Any]]:
    """Registers, spills and widths of memory accesses; a process of its own, as Triton needs it."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kernels" / "aot.py")],
        env={**kept, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"the kernels do not compile: {done.stderr.strip()[-400:]}")
    rows = json.loads(done.stdout)
    return [{**row, "kind": COMPILED} for row in rows if "control" not in row["case"]]


def show(found: dict[str, Any]) -> None:
    """The tables, in short."""
    print(f"{'bytes, ' + COUNTED:42} " + " ".join(f"{name:>15}" for name in KERNELS))
    for place in SHAPES:
        sizes = {row["kernel"]: row["bytes"] for row in found["bytes"] if row["place"] == place}
        shown = (f"{sizes[name] / 1e6:12.2f} MB" if name in sizes else 15 * " " for name in KERNELS)
        print(f"{place:42} " + " ".join(shown))
    print(f"\n{COMPILED}: registers / spilled bytes / bits of loads and stores")
    for row in found["code"]:
        loads, stores = (_widths(row[key]) for key in ("loads", "stores"))
        figures = f"{row['registers']:4d} {row['spilled']:3d}  {loads:28} {stores}"
        print(f"{row['target']:7} {row['case']:28} {figures}")


def _widths(counts: dict[str, int]) -> str:
    return " ".join(f"{bits}x{count}" for bits, count in sorted(counts.items(), key=_bits))


def _bits(item: tuple[str, int]) -> int:
    return -int(item[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    show(analysis())
