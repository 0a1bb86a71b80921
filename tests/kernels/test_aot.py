"""The machine code of every kernel for GPUs that this machine lacks: compiled, not run.

Slow the first time (about 30 s of one core), then Triton's cache answers. LESA_AOT_TARGETS names
the targets, separated by spaces; all by default, of which those in LATER are marked slow.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

TARGETS = os.environ.get("LESA_AOT_TARGETS", "sm_80 sm_89 sm_90 sm_100 gfx942").split()
LATER = {"sm_89", "sm_100", "gfx942"}
REGISTERS = {  # of a thread
    "mix": 64,
    "mix per channel": 96,
    "mix_fp8": 80,
    "push_fp8": 96,
    "spline_mix": 96,
    "spline_mix, K=8": 144,
    "gram": 104,
    "gram, K=8": 168,
    "mix_grad_features": 64,
    "mix_grad_table per channel": 80,
    "mix_modulate": 72,
    "mix_modulate, K=8": 144,
    "mix_modulate, C=5120": 104,
}
# KB in flight per multiprocessor. On an H200 kernels with 40, 48 and 128 of them reached 84, 91 and
# 98 % of a copy. Features' gradients read one tensor and write three; fp8 is half as many bytes.
ENOUGH = 48
KILOBYTES = {"mix_grad_features": 14, "mix_grad_table per channel": 30, "mix_fp8": 30}
TIMED = ("mix, K=8",)  # whose configuration for sm_90 is the fastest on an H200, resident or not
SCALARS = 48  # 32-bit loads of slots, weights, step and the gate, outside the loop over features


@cache
def compiled(target):
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels")])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("aot.py"), target],
        env={**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def flaws(row):
    """What is wrong with one kernel's code, in words."""
    case, loads, stores = row["case"], row["loads"], row["stores"]
    limit = REGISTERS.get(case) or REGISTERS[case.split(",")[0]]
    limit += 32 * (row["target"] == "gfx942")  # which has twice the registers
    history = 8 if "K=8" in case else 3
    wide = {"mix_grad_features": 1, "push_fp8": 1}.get(case, history)
    kept = {"gram": history + 3, "push_fp8": 1}.get(case.split(",")[0], 0)  # sums, scales
    narrow = history if case.startswith("mix_modulate") else 0  # the first numbers of a row
    found = {
        f"{row['spilled']} bytes spilled": row["spilled"],
        f"{row['registers']} registers, over {limit}": row["registers"] > limit,
        f"loads below 32 bits: {loads}":
            sum(count for bits, count in loads.items() if int(bits) < 32) > narrow,
        f"features not loaded by 128 bits: {loads}": loads.get("128", 0) < wide,
        f"too many narrow loads: {loads}": loads.get("32", 0) > SCALARS,
        f"features not stored by 128 bits: {stores}":
            set(stores) - {"128"} != ({"32"} if kept else set()) or stores.get("32", 0) > kept,
    }  # fmt: skip
    if row["target"] != "gfx942" and case != "mix, latent":  # of which each tile is in flight
        floor = KILOBYTES.get(case, ENOUGH)
        held, launched = row["resident"], row["programs"]
        found[f"{row['kilobytes']} KB in flight, below {floor}"] = row["kilobytes"] < floor
        crowded = launched > held + 0.1 and case not in TIMED
        found[f"{launched:.1f} programs launched where {held} fit"] = crowded
    return [words for words, true in found.items() if true]


@pytest.mark.parametrize(
    "target", [pytest.param(t, marks=[pytest.mark.slow] * (t in LATER)) for t in TARGETS]
)
def test_no_spills_wide_accesses_and_few_registers(target):
    rows = [row for row in compiled(target) if "control" not in row["case"]]
    assert len(rows) >= 10
    assert not {row["case"]: flaws(row) for row in rows if flaws(row)}


def test_small_features_take_one_round_of_loads():
    """All loads of the default tap's mix are asked for at once, by programs on all processors."""
    [row] = [row for row in compiled("sm_90") if row["case"] == "mix, latent"]
    assert row["in_flight"] == 4 * 16
    assert row["stores"] == {"128": 1}
    assert row["programs"] > 0.9


def test_a_load_counts_until_it_is_waited_for():
    code = [
        ("LDG.E.128", "R4, desc[UR4][R2.64]"),
        ("LDG.E", "R12, desc[UR4][R2.64]"),
        ("LDG.E.128.CONSTANT", "R8, desc[UR4][R2.64+0x10]"),
        ("FADD", "R0, R6, R0"),
        ("LDG.E.64", "R4, desc[UR4][R2.64]"),
        ("IADD3", "R3, R4, R8, RZ"),
    ]
    in_flight = runpy.run_path(str(Path(__file__).with_name("sass.py")))["in_flight"]
    assert in_flight(code[:1]) == 16
    assert in_flight(code[:3]) == 32
    assert in_flight(code) == 32  # the first load has come before the fourth is asked for


def test_the_check_can_fail():
    rows = {row["case"]: flaws({**row, "case": "mix"}) for row in compiled("sm_90")}
    odd, starved = rows["control: odd width"], rows["control: few registers"]
    crowded = rows["control: many programs"]
    assert any("KB in flight, below" in words for words in odd)
    assert any("23.3 programs launched where 16 fit" in words for words in crowded)
    assert any("loads below 32 bits" in words for words in odd)
    assert any("not stored by 128 bits" in words for words in odd)
    assert any("bytes spilled" in words for words in starved)
