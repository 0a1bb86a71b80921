"""The compiled CPU kernels against float64 references of the same rounded inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lesa_kernels.gate import Gate
from lesa_testbed import reference as exactly
from torch import Tensor
from torch.nn import functional

from lesa.ops import native
from lesa.ops.eager import gate_value

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPES = ((1,), (63,), (100,), (4097,), (2, 3, 64))


@pytest.fixture
def ops(native_kernels: None) -> Any:
    return torch.ops.lesa_native


@pytest.fixture(params=(16, 32, 64), ids=("baseline", "AVX2", "AVX-512"))
def wide(request: pytest.FixtureRequest, ops: Any) -> Any:
    """The operators on vectors of 16, 32 and 64 bytes."""
    if ops.vector_bytes(request.param) != request.param:
        ops.vector_bytes()
        pytest.skip(f"this machine has no vectors of {request.param} bytes")
    yield ops
    ops.vector_bytes()


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An output between two guards, off alignment: what a kernel must and must not write."""
    size = torch.Size(shape).numel()
    whole = torch.full((size + 40,), float("nan"), dtype=dtype)
    return whole[17 : 17 + size].view(shape)


def untouched(out: Tensor) -> bool:
    """Whether the guards around a poisoned output are intact."""
    size = out.numel()
    guards = out.as_strided((17,), (1,), 0), out.as_strided((23,), (1,), 17 + size)
    return all(bool(guard.isnan().all()) for guard in guards)


def close(found: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> bool:
    """Within half an ulp of the store plus what summing `terms` in fp32 (fp64) can lose."""
    wide = torch.float64 if found.dtype == torch.float64 else torch.float32
    info = torch.finfo(found.dtype)
    store = info.eps / 2 * exact.abs() + info.smallest_normal * info.eps
    allowed = 1.01 * store + (terms + 2) * torch.finfo(wide).eps * magnitude
    return bool(((found.double() - exact).abs() <= allowed).all())


def problem(shape: tuple[int, ...], history: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """ring with one slot too many, slots in a mixed order, coefficients."""
    ring = draw(history + 1, *shape, dtype=dtype)
    slots = torch.randperm(history + 1, generator=torch.Generator().manual_seed(1))[:history].int()
    return ring, slots, draw(history, seed=2)


def reference(ring: Tensor, slots: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """sum_k c_k ring[slots_k] in float64, and the same sum of absolute values."""
    parts = ring[slots.long()].double() * coefficients.double().view(-1, *[1] * (ring.ndim - 1))
    return parts.sum(0), parts.abs().sum(0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mix_matches_float64(wide, dtype):
    for shape in SHAPES:
        for history in (1, 2, 3, 4, 7, 14, 16):
            ring, slots, coefficients = problem(shape, history, dtype)
            latent, out = draw(*shape, dtype=dtype, seed=3), poisoned(shape, dtype)
            wide.mix_out(ring, slots, coefficients.double(), latent, -0.75, 0.125, out)
            exact, magnitude = reference(ring, slots, coefficients)
            exact = exact - 0.75 * latent.double() + 0.125
            magnitude = magnitude + 0.75 * latent.double().abs() + 0.125
            assert close(out, exact, magnitude, history + 2), (shape, history)
            assert untouched(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", DTYPES)
def test_the_latent_may_have_another_dtype(ops, dtype, own):
    ring, slots, coefficients = problem((163,), 3, dtype)
    latent, out = draw(163, dtype=own, seed=3), poisoned((163,), dtype)
    ops.mix_out(ring, slots, coefficients, latent, 1.5, 0.0, out)
    exact, magnitude = reference(ring, slots, coefficients)
    exact, magnitude = exact + 1.5 * latent.double(), magnitude + 1.5 * latent.double().abs()
    assert close(out, exact, magnitude, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_over_a_slot(wide, dtype):
    ring, slots, coefficients = problem((1021,), 3, dtype)
    out = poisoned((1021,), dtype)
    wide.mix_out(ring, slots, coefficients, None, 0.0, 0.0, out)
    before, evicted = ring.clone(), int(slots[2])
    wide.mix_out(ring, slots, coefficients, None, 0.0, 0.0, ring[evicted])
    assert torch.equal(ring[evicted], out)
    kept = [slot for slot in range(4) if slot != evicted]
    assert torch.equal(ring[kept], before[kept])


def test_what_has_no_weight_is_not_read(ops):
    ring, slots, _ = problem((200,), 3, torch.float32)
    ring[int(slots[1])] = float("nan")
    out = poisoned((200,), torch.float32)
    unread = torch.full((200,), float("inf"))
    ops.mix_out(ring, slots, torch.tensor([2.0, 0.0, 1.0]), unread, 0.0, 0.0, out)
    assert torch.equal(out, ring[int(slots[0])] * 2 + ring[int(slots[2])])
    ops.mix_out(ring, slots, torch.zeros(3), None, 0.0, 0.5, out)
    assert bool((out == 0.5).all())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_every_store_rounds_as_torch_does(wide, dtype):
    """Random bit patterns: ties, overflow, subnormals, infinities and NaNs."""
    bits = torch.randint(-(2**31), 2**31, (60_000,), generator=torch.Generator().manual_seed(0))
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    ties = (halves.view(torch.int32) + 0x1000).view(torch.float32)
    latent = torch.cat([bits.int().view(torch.float32), halves, ties])
    ring, out = torch.zeros(1, len(latent), dtype=dtype), poisoned(tuple(latent.shape), dtype)
    wide.mix_out(ring, torch.zeros(1).int(), torch.zeros(1), latent, 1.0, 0.0, out)
    assert torch.allclose(out, latent.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_every_number_is_read_exactly(wide, dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    out = poisoned(tuple(every.shape), dtype)
    wide.mix_out(every[None], torch.zeros(1).int(), torch.ones(1), None, 0.0, 0.0, out)
    assert torch.equal(out, every)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_streaming_change_nothing(ops, dtype):
    """Large enough for several threads and for stores around the caches."""
    size = (8 << 20) // dtype.itemsize + 777
    ring = draw(1, 1 << 16, dtype=dtype).repeat(1, size // (1 << 16) + 1)[:, :size].contiguous()
    slots, weight = torch.zeros(1).int(), torch.tensor([0.3])
    pieces, threads = torch.full((size,), float("nan"), dtype=dtype), torch.get_num_threads()
    out = torch.empty_like(pieces)
    for begin in range(0, size, 9973):
        piece = ring[:, begin : begin + 9973].contiguous()
        ops.mix_out(piece, slots, weight, None, 0.0, 0.1, pieces[begin : begin + 9973])
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            ops.mix_out(ring, slots, weight, None, 0.0, 0.1, out.fill_(float("nan")))
            assert torch.equal(out, pieces)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", (torch.float32, torch.bfloat16))
def test_mix_modulate_matches_float64(wide, dtype, own):
    for shape in ((1, 1), (1, 7, 63), (2, 5, 100), (3, 2, 2, 128), (2, 4097)):
        ring, slots, coefficients = problem(shape, 3, dtype)
        scale, shift = draw(shape[0], 2 * shape[-1], dtype=own, seed=3).chunk(2, dim=1)
        out, feature = poisoned(shape, dtype), poisoned(shape, dtype)
        wide.mix_modulate_out(ring, slots, coefficients, 0.25, scale, shift, 1e-6, out, feature)
        mixed = reference(ring, slots, coefficients)[0] + 0.25
        between = (shape[0], *[1] * (len(shape) - 2), shape[-1])
        gain = 1 + scale.double().view(between)
        normed = functional.layer_norm(mixed, shape[-1:], eps=1e-6)
        exact = normed * gain + shift.double().view(between)
        # the mix loses some ulp of its terms, the norm divides them by the deviation
        magnitude = gain.abs() * (4 + normed.abs()) + exact.abs()
        assert close(out, exact, magnitude, 16), shape
        plain = poisoned(shape, dtype)
        wide.mix_out(ring, slots, coefficients, None, 0.0, 0.25, plain)
        assert torch.equal(feature, plain)
        assert untouched(out) and untouched(feature)
        wide.mix_modulate_out(
            ring, slots, coefficients, 0.25, scale, shift, 1e-6, ring[int(slots[1])]
        )
        assert torch.equal(ring[int(slots[1])], out)


def experts_of(gate: Gate) -> tuple[Any, ...]:
    """The only expert's tensors, and the ends of its grid."""
    return *(part[0] for part in gate[:4]), gate.low, gate.high


def gate(inputs: int, nodes: int) -> tuple[Any, ...]:
    """tau, the tensors of one expert, and the ends of its grid."""
    sizes = (inputs,), (inputs, nodes), (nodes,), (nodes,), (8, nodes)
    return *(draw(*size, seed=seed) for seed, size in enumerate(sizes, 1)), -1.0, 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(63,), (4097,), (2, 3, 64)])
def test_spline_mix_matches_float64(wide, dtype, shape):
    """Nodes on the grid, at its ends and beyond; one feature without a weight, which is NaN."""
    ring, slots, weights = problem(shape, 3, dtype)
    weights[1] = 0
    ring[int(slots[1])] = torch.nan
    tau, projection, shift, base, spline, low, high = gate(4, 40)
    shift[:2] = torch.tensor([-100.0, 100.0])
    experts = Gate(*(part[None] for part in (projection, shift, base, spline)), low, high)
    exact = torch.empty(shape, dtype=torch.float64)
    kept = ring.nan_to_num()
    exactly.spline_mix(
        kept, slots, weights[None], tau[None], experts, torch.tensor([0]), exact,
        bias=torch.tensor([0.25]),
    )  # fmt: skip
    out = poisoned(shape, dtype)
    wide.spline_mix_out(
        ring, slots, weights, tau, projection, shift, base, spline, low, high, 0.25, out
    )
    newest, alpha = kept[int(slots[0])].double(), gate_value(tau, *experts_of(experts))
    residual = reference(kept, slots, weights)[1] + 0.25
    terms = 5 if dtype != torch.float64 else 9000  # the reference stays 1e-12 from the grid's end
    assert untouched(out) and close(out, exact, newest.abs() + abs(float(alpha)) * residual, terms)


def test_a_gate_that_does_not_fit_is_refused(ops):
    ring, slots, weights = problem((2, 8), 2, torch.float32)
    tau, projection, *rest = gate(4, 6)
    for wrong in (
        (tau, projection.mT.contiguous(), *rest),
        (tau[:3], projection, *rest),
        (tau, projection, *rest[:3], 1.0, 1.0),
        (tau.double(), projection, *rest),
    ):
        with pytest.raises(RuntimeError, match="the gate's tensors"):
            ops.spline_mix_out(ring, slots, weights, *wrong, 0.0, torch.empty(2, 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_matches_float64(wide, dtype):
    for shape in ((1,), (63,), (6, 100), (2, 3, 4097)):
        for samples in {1, shape[0]}:
            ring, slots, _ = problem(shape, 3, dtype)
            feature, base = draw(*shape, dtype=dtype, seed=4), draw(*shape, dtype=dtype, seed=5)
            out = poisoned((samples, 6), torch.float64)
            wide.gram_out(feature, ring, slots, base, out)
            others = [torch.ones_like(feature), feature, *ring[slots.long()], base]
            parts = torch.stack([(feature.double() * x.double()).view(samples, -1) for x in others])
            exact, magnitude = parts.sum(2).mT, parts.abs().sum(2).mT
            assert bool(((out - exact).abs() <= 1e-13 * magnitude).all()), (shape, samples)
            assert untouched(out)
            short = poisoned((samples, 5), torch.float64)
            wide.gram_out(feature, ring, slots, None, short)
            assert torch.equal(short, out[:, :5])


def test_gram_does_not_depend_on_the_threads(ops):
    ring, slots, _ = problem((300_001,), 2, torch.bfloat16)
    sums, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            sums.append(torch.empty(1, 4, dtype=torch.float64))
            ops.gram_out(ring[0].clone(), ring, slots, None, sums[-1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*sums)


def test_empty_features_are_left_alone(ops):
    ring, slots, coefficients = torch.empty(3, 0, 8), torch.zeros(2).int(), torch.ones(2)
    out, row, sums = torch.empty(0, 8), torch.empty(0, 8), torch.full((1, 4), 7.0).double()
    ops.mix_out(ring, slots, coefficients, None, 0.0, 0.0, out)
    ops.mix_modulate_out(ring, slots, coefficients, 0.0, row, row, 1e-6, out)
    ops.gram_out(out, ring, slots, None, sums)
    assert not sums.any()


def refusals() -> dict[str, tuple[dict[str, Any], str]]:
    """What is wrong with a mix of [3, 4, 8] features, and a part of the sentence that says so."""
    ring = draw(3, 4, 8)
    return {
        "empty ring": ({"ring": draw(0, 4, 8)}, r"ring has shape \[0, 4, 8\]; it must be \[K"),
        "transposed ring": ({"ring": draw(3, 8, 4).mT}, r"ring of shape \[3, 4, 8\] is not contig"),
        "transposed out": ({"out": draw(8, 4).mT}, r"not contiguous in memory; pass out\.contig"),
        "strided slots": ({"slots": torch.zeros(6).int()[::2]}, "slots .* not contiguous"),
        "long slots": ({"slots": torch.arange(3)}, "slots must be int32"),
        "17 slots": ({"slots": torch.zeros(17).int()}, r"slots has shape \[17\].*K = 1\.\.16"),
        "no slots": ({"slots": torch.zeros(0).int()}, r"slots has shape \[0\]"),
        "slot 3": ({"slots": torch.tensor([0, 1, 3]).int()}, r"slots\[2\] is 3; the ring has 3"),
        "slot -1": ({"slots": torch.tensor([-1, 1, 2]).int()}, r"slots\[0\] is -1"),
        "coefficients": ({"coefficients": torch.ones(2)}, r"coefficients has shape \[2\].*\[3\]"),
        "bf16 coefficients": ({"coefficients": torch.ones(3).bfloat16()}, "float32 or float64"),
        "shape": ({"out": draw(4, 7)}, r"ring has shape \[3, 4, 8\], but out \[4, 7\]"),
        "dtype": ({"out": draw(4, 8).bfloat16()}, "out has another dtype than the ring"),
        "integers": ({"ring": ring.int(), "out": ring[0].int()}, "out is of a dtype without"),
        "half a slot": ({"ring": ring, "out": ring.view(-1)[16:48].view(4, 8)}, "64 bytes into"),
        "latent": ({"latent": draw(4, 7)}, r"latent has shape \[4, 7\], but out \[4, 8\]"),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_cannot_be_mixed_is_refused_in_one_sentence(ops, name):
    change, sentence = refusals()[name]
    arguments: dict[str, Any] = {
        "ring": draw(3, 4, 8),
        "slots": torch.arange(3).int(),
        "coefficients": torch.ones(3),
        "latent": None,
        "latent_coefficient": 1.0,
        "bias": 0.0,
        "out": draw(4, 8),
    }
    with pytest.raises(RuntimeError, match=sentence):
        ops.mix_out(**{**arguments, **change})


def test_modulation_and_sums_of_the_wrong_shape_are_refused(ops):
    ring, slots, coefficients = problem((2, 3, 8), 2, torch.float32)
    out, row = torch.empty(2, 3, 8), draw(2, 8)
    for scale, shift, sentence in (
        (draw(1, 8), row, r"scale has shape \[1, 8\]; it must be \[2, 8\]"),
        (row, draw(8, 2).mT, "shift has a last stride of 2"),
        (row, row.bfloat16(), "scale and shift differ in dtype or strides"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            ops.mix_modulate_out(ring, slots, coefficients, 0.0, scale, shift, 1e-6, out)
    with pytest.raises(RuntimeError, match="feature and out overlap"):
        ops.mix_modulate_out(ring, slots, coefficients, 0.0, row, row, 1e-6, out, out)
    with pytest.raises(RuntimeError, match=r"float64 \[P, 4\] with P a divisor of 48"):
        ops.gram_out(out, ring, slots, None, torch.empty(5, 4, dtype=torch.float64))


@pytest.mark.parametrize("name", native.OPERATORS)
def test_opcheck(ops, name):
    ring, slots, coefficients = problem((2, 3, 8), 2, torch.float32)
    out, row = torch.empty(2, 3, 8), draw(2, 8)
    sums = torch.empty(2, 5, dtype=torch.float64)
    arguments = {
        "mix_out": (ring, slots, coefficients, draw(2, 3, 8), 0.5, 0.1, out),
        "mix_modulate_out": (
            ring, slots, coefficients, 0.1, row, row, 1e-6, out, torch.empty_like(out)
        ),
        "gram_out": (draw(2, 3, 8), ring, slots, draw(2, 3, 8), sums),
        "spline_mix_out": (ring, slots, coefficients.float(), *gate(4, 6), 0.1, out),
    }[name]  # fmt: skip
    torch.library.opcheck(getattr(ops, name).default, arguments)


def test_a_compiled_graph_holds_the_operator(ops):
    """Also where it writes into the ring that it reads."""

    def step(ring: Tensor, slots: Tensor, coefficients: Tensor) -> Tensor:
        out = torch.empty_like(ring[0])
        ops.mix_out(ring, slots, coefficients, None, 0.0, 0.0, out)
        ops.mix_out(ring, slots, coefficients, None, 0.0, 1.0, ring[2])
        return out * 2

    ring, slots, coefficients = problem((5, 8), 3, torch.float32)
    eager, traced = ring.clone(), ring.clone()
    expected = step(eager, slots, coefficients)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(traced, slots, coefficients)
    assert torch.equal(found, expected) and torch.equal(traced, eager)


def test_why_not_names_the_file_and_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("LESA_NATIVE_DIR", str(tmp_path))
    why_not = native.why_not.__wrapped__
    assert "_native_cpu.so does not exist; build it: LESA_BUILD_EXT=1" in why_not("cpu")
    assert "_native_cuda.so does not exist" in why_not("cuda")
    (tmp_path / "_native_cpu.so").write_text("no library")
    assert "does not load beside torch" in why_not("cpu")


def test_status_tells_the_instruction_set(ops):
    assert native.isa() in ("baseline", "AVX2", "AVX-512")
    status = native.status()
    assert native.isa() in status["cpu"] and set(status) == {"cpu", "cuda"}
