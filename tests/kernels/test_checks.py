"""What launchers refuse: one sentence that names the argument."""

from __future__ import annotations

import pytest
import torch
from lesa_kernels.experimental.fp8 import mix_fp8, push_fp8
from lesa_kernels.experimental.gram import gram
from lesa_kernels.gate import pack_gate
from lesa_kernels.mix import mix
from lesa_kernels.mix_modulate import mix_modulate
from lesa_kernels.spline_mix import spline_mix

from lesa.errors import LesaError
from lesa.forecasters.kan import RidgeSpline

RING = torch.zeros(3, 4, 16)
SLOTS, STEP = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
COMMON = {"ring": RING, "slots": SLOTS, "step": STEP, "out": torch.zeros(4, 16)}
MIX = {**COMMON, "table": torch.zeros(5, 2)}
OUT = MIX["out"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"out": torch.zeros(16, 4).T}, r"out has strides \[1, 4\].*out.contiguous\(\)"),
        ({"ring": torch.zeros(3, 4, 32)[..., ::2]}, r"ring has strides.*ring.contiguous\(\)"),
        ({"out": OUT.double()}, "out is torch.float64; the kernel takes float32, float16, bfl"),
        ({"ring": torch.zeros(3, 4, 8)}, r"ring has shape \[3, 4, 8\], but out \[4, 16\]"),
        ({"ring": RING.to("meta")}, "ring is on meta; move it to cpu"),
        ({"slots": SLOTS.long()}, "slots is torch.int64; the kernel takes int32"),
        ({"slots": SLOTS[:0]}, r"slots has shape \[0\]; it must be \[K\] with K = 1..8"),
        ({"slots": SLOTS.repeat(5)}, r"slots has shape \[10\]"),
        ({"step": torch.zeros(2, dtype=torch.int32)}, "step has 2 elements"),
        ({"step": torch.zeros(1)}, "step is torch.float32; the kernel takes int32, int64"),
        ({"table": torch.zeros(5, 3)}, r"table has shape \[5, 3\].*\[steps, 2\]"),
        ({"table": torch.zeros(5, 2).double()}, "table is torch.float64"),
        ({"latent": OUT}, r"table has shape \[5, 2\].*\[steps, 3\]"),
        ({"latent": torch.zeros(4, 8)}, r"latent has shape \[4, 8\], but out \[4, 16\]"),
        ({"table": torch.zeros(5, 2, 3)}, "3 bands, which do not divide 16 channels"),
        ({"table": torch.zeros(5, 2, 3), "band_size": 7}, "3 bands of band_size=7 do not divide"),
        ({"bias": torch.zeros(4)}, r"bias has shape \[4\]; it must be \[5\]"),
        ({"out": RING.view(-1)[8:72].view(4, 16)}, "out begins 32 bytes into the ring"),
    ],
)
def test_mix(changes, sentence):
    with pytest.raises(LesaError, match=sentence):
        mix(**{**MIX, **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scale": torch.zeros(4, 8)}, r"scale has shape \[4, 8\]; it must be \[4, 16\]"),
        ({"shift": torch.zeros(16, 4).T}, "shift is torch.float32 on cpu with strides"),
        ({"shift": torch.zeros(4, 16).half()}, "make them two chunks of one tensor"),
        ({"out": RING[2]}, "out is a slot of the ring"),
        ({"feature": torch.zeros(4, 8)}, r"feature has shape \[4, 8\]"),
    ],
)
def test_mix_modulate(changes, sentence):
    rows = {"scale": torch.zeros(4, 16), "shift": torch.zeros(4, 16)}
    with pytest.raises(LesaError, match=sentence):
        mix_modulate(**{**MIX, **rows, **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tau": torch.zeros(5, 4)}, r"tau has shape \[5, 4\].*\[5, 3\]"),
        ({"tau": torch.zeros(5, 3).half()}, "tau is torch.float16"),
        ({"experts": torch.zeros(4, dtype=torch.int32)}, r"experts has shape \[4\]"),
        ({"base": torch.zeros(1, 7)}, "the gate's tensors do not fit together"),
        ({"high": -3.0}, "the gate's tensors do not fit together"),
    ],
)
def test_spline_mix(changes, sentence):
    gate = pack_gate([RidgeSpline(3, 8)])
    gate = gate._replace(**{k: v for k, v in changes.items() if k in gate._fields})
    rest = {k: v for k, v in changes.items() if k not in gate._fields}
    arguments = {**COMMON, "weights": torch.zeros(5, 2), "tau": torch.zeros(5, 3), "gate": gate}
    with pytest.raises(LesaError, match=sentence):
        spline_mix(**{**arguments, **rest})


def test_bands_where_a_kernel_has_none():
    """[S, K, G] read as [S, K] would be other rows of the table."""
    banded, rows = torch.zeros(5, 2, 4), torch.zeros(4, 16)
    sentence = r"has shape \[5, 2, 4\]; this kernel takes no bands: with these slots it must be"
    with pytest.raises(LesaError, match=f"table {sentence}"):
        mix_modulate(**{**MIX, "table": banded}, scale=rows, shift=rows)
    gate = pack_gate([RidgeSpline(3, 8)])
    with pytest.raises(LesaError, match=f"weights {sentence}"):
        spline_mix(**COMMON, weights=banded, tau=torch.zeros(5, 3), gate=gate)
    codes, scales = RING.to(torch.float8_e4m3fn), torch.ones(3, 4)
    with pytest.raises(LesaError, match=f"table {sentence}"):
        mix_fp8(**{**MIX, "table": banded, "ring": codes}, scales=scales)


def test_gram_and_fp8():
    with pytest.raises(LesaError, match=r"out has shape \[1, 3\]; it must be \[P, 4\]"):
        gram(OUT, RING, SLOTS, torch.zeros(1, 3).double())
    with pytest.raises(LesaError, match="out is torch.float32 on cpu; it must be float64"):
        gram(OUT, RING, SLOTS, torch.zeros(1, 4))
    codes = RING.to(torch.float8_e4m3fn)
    with pytest.raises(LesaError, match=r"scales has shape \[3, 1\]; it must be \[3, 4\]"):
        push_fp8(OUT, codes, torch.zeros(3, 1), STEP)
    with pytest.raises(LesaError, match="ring is torch.float32; the kernel takes float8_e4m3fn"):
        push_fp8(OUT, RING, torch.zeros(3, 4), STEP)
