"""lesa::* against the float64 references, on every backend that runs here."""

from __future__ import annotations

import pytest
import torch
from lesa_kernels.gate import Gate
from lesa_testbed import reference

import lesa
from lesa import ops
from lesa.errors import LesaError
from lesa.ops import backend, eager

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEP = torch.tensor(2, dtype=torch.int32)
SLOTS = torch.tensor([2, 0, 1], dtype=torch.int32)


@pytest.fixture(params=["eager", "native"])
def forced(request, monkeypatch):
    """Everything runs on one backend."""
    if request.param == "native":
        request.getfixturevalue("native_kernels")
    monkeypatch.setenv("LESA_BACKEND", request.param)
    return request.param


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gate(experts: int = 2, inputs: int = 4, nodes: int = 6) -> Gate:
    return Gate(
        draw(experts, inputs, nodes, seed=3),
        draw(experts, nodes, seed=4),
        draw(experts, nodes, seed=5),
        draw(experts, 8, nodes, seed=6),
        -1.0,
        1.0,
    )


def calls(dtype: torch.dtype) -> dict[str, tuple[list, dict, torch.Tensor]]:
    """Per name: arguments before `out`, options, and a float64 result to be written."""
    ring, shape = draw(4, 2, 5, 24, dtype=dtype), (2, 5, 24)
    table, bias = draw(5, 3, seed=1), draw(5, seed=2)
    wide, banded = draw(5, 4, seed=1), draw(5, 3, 8, seed=1)
    latent, rows = draw(*shape, dtype=dtype, seed=7), draw(5, 2, 48, dtype=dtype, seed=8)
    scale, shift = rows.chunk(2, dim=-1)
    tau, experts = draw(5, 4, seed=9), torch.tensor([0, 0, 1, 1, 1], dtype=torch.int32)
    mixed = torch.empty(shape, dtype=torch.float64)
    spline = [ring, SLOTS, table, tau, gate(), STEP]
    return {
        "mix": ([ring, SLOTS, table, STEP], {}, mixed),
        "mix with bias": ([ring, SLOTS, table, STEP], {"bias": bias}, mixed),
        "mix with latent": ([ring, SLOTS, wide, STEP], {"latent": latent, "bias": bias}, mixed),
        "mix with bands": ([ring, SLOTS, banded, STEP], {}, mixed),
        "mix with wide bands": ([ring, SLOTS, banded[..., :2], STEP], {"band_size": 60}, mixed),
        "mix_modulate": ([ring, SLOTS, table, STEP, scale, shift], {"bias": bias}, mixed),
        "mix_modulate of one row": (
            [ring, SLOTS, table, STEP, scale[0], shift[0]], {"eps": 1e-5}, mixed,
        ),
        "spline_mix": (spline, {"experts": experts, "bias": bias}, mixed),
        "spline_mix of one expert": (spline, {}, mixed),
        "gram": ([ring[3], ring, SLOTS], {}, torch.empty(2, 5, dtype=torch.float64)),
        "gram with base": (
            [ring[3], ring, SLOTS], {"base": latent}, torch.empty(2, 6, dtype=torch.float64),
        ),
    }  # fmt: skip


NAMES = list(calls(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_against_the_reference(forced, name, dtype):
    arguments, options, exact = calls(dtype)[name]
    name = name.split()[0]
    getattr(reference, name)(*arguments, exact, **options)
    kind = torch.float64 if name == "gram" else dtype
    out = torch.full(exact.shape, float("nan"), dtype=kind)
    assert getattr(ops, name)(*arguments, out, **options) is out
    if name == "gram":
        options["samples"] = 2
    again = getattr(ops, name)(*arguments, **options)
    assert torch.equal(again, out)
    tolerance = 1e-5 if name == "gram" else 4e-6
    torch.testing.assert_close(
        out.double(), exact, rtol=max(tolerance, torch.finfo(dtype).eps), atol=1e-4
    )


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    arguments, options, exact = calls(torch.float32)[name]
    name = name.split()[0]
    if name == "spline_mix":
        arguments[4:5] = arguments[4]
    functional = getattr(torch.ops.lesa, name).default
    every = {"latent": None, "bias": None, "band_size": None} if name == "mix" else {}
    torch.library.opcheck(functional, tuple(arguments), every | options)
    given = exact if name == "gram" else torch.empty_like(exact, dtype=torch.float32)
    in_place = getattr(torch.ops.lesa, f"{name}_out").default
    torch.library.opcheck(in_place, (*arguments, given), options)


def test_opcheck_of_the_form_that_writes_the_feature_too():
    arguments, options, _ = calls(torch.float32)["mix_modulate"]
    given = (torch.empty(2, 5, 24), torch.empty(2, 5, 24))
    in_place = torch.ops.lesa.mix_modulate_and_feature_out.default
    torch.library.opcheck(in_place, (*arguments, *given), options)


def test_the_feature_goes_along_with_the_modulated_one(forced):
    arguments, options, exact = calls(torch.float32)["mix_modulate"]
    out, feature = torch.empty(2, 5, 24), torch.full((2, 5, 24), float("nan"))
    ops.mix_modulate(*arguments, out, feature=feature, **options)
    reference.mix(*arguments[:4], exact, **options)
    torch.testing.assert_close(feature.double(), exact, rtol=1e-6, atol=1e-5)
    again = torch.full_like(feature, float("nan"))
    assert torch.equal(ops.mix_modulate(*arguments, feature=again, **options), out)
    assert torch.equal(again, feature)


@pytest.mark.parametrize("case", ["mix with latent", "mix with bands", "mix with wide bands"])
def test_gradients_are_those_of_the_reference(case):
    (ring, slots, table, step), options, _ = calls(torch.float32)[case]
    latent, bias = options.get("latent"), options.get("bias")
    if bias is None:
        bias = draw(5, table.shape[2], seed=2)
    found = []
    for mix, dtype in ((ops.mix, torch.float32), (reference.mix_differentiable, torch.float64)):
        leaves = [
            None if x is None else x.detach().to(dtype).requires_grad_()
            for x in (ring, table, latent, bias)
        ]
        r, t, x, b = leaves
        out = mix(r, slots, t, step, latent=x, bias=b, band_size=options.get("band_size"))
        given = [leaf for leaf in leaves if leaf is not None]
        found.append(torch.autograd.grad(out.pow(2).sum(), given))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


def test_only_what_needs_a_gradient_gets_one():
    (ring, slots, table, step), _, _ = calls(torch.float32)["mix"]
    table.requires_grad_()
    ops.mix(ring, slots, table, step).sum().backward()
    assert table.grad is not None and ring.grad is None


def test_one_graph_holds_them_all():
    arguments, options, _ = calls(torch.float32)["mix_modulate"]
    ring, slots, table, step, scale, shift = arguments

    @torch.compile(fullgraph=True, backend="aot_eager")
    def skipped(ring, out):
        ops.mix(ring, slots, table, step, out)
        return ops.mix_modulate(ring, slots, table, step, scale, shift) + out

    out = torch.empty(2, 5, 24)
    found = skipped(ring, out)
    assert torch.equal(out, ops.mix(ring, slots, table, step))
    assert torch.equal(found, out + ops.mix_modulate(*arguments))


def test_what_has_no_weight_does_not_enter():
    (ring, slots, table, step), _, _ = calls(torch.float32)["mix"]
    table[:, 1] = 0
    ring[0] = float("nan")
    assert ops.mix(ring, slots, table, step).isfinite().all()
    banded = table[:, :, None].repeat(1, 1, 8)
    assert ops.mix(ring, slots, banded, step).isfinite().all()
    scale = torch.zeros(2, 24)
    assert ops.mix_modulate(ring, slots, table, step, scale, scale).isfinite().all()


def test_float64_features_stay_float64(forced):
    (ring, slots, table, step), _, exact = calls(torch.float32)["mix"]
    out = ops.mix(ring.double(), slots, table, step)
    torch.testing.assert_close(out, reference.mix(ring, slots, table, step, exact), rtol=1e-13,
                               atol=1e-13)  # fmt: skip


def test_the_environment_chooses(monkeypatch, native_kernels):
    monkeypatch.setenv("LESA_BACKEND", "auto")
    backend._active.cache_clear()
    backend.why_not.cache_clear()
    assert backend.active("cpu") == "native"
    monkeypatch.setenv("LESA_BACKEND", "eager")
    assert backend.active("cpu") == "eager"
    assert ops.implementation("mix", torch.zeros(3), 3) is eager.mix
    monkeypatch.setenv("LESA_BACKEND", "cuda")
    with pytest.raises(LesaError, match="LESA_BACKEND='cuda': no backend; set it to auto, triton"):
        backend.active("cpu")


def test_an_unknown_backend_is_refused_before_any_step(monkeypatch, tiny_flux):
    monkeypatch.setenv("LESA_BACKEND", "bogus")
    with pytest.raises(LesaError, match="LESA_BACKEND='bogus': no backend; set it to auto"):
        lesa.enable(tiny_flux)
    monkeypatch.setenv("LESA_BACKEND", "")
    assert backend.wanted() == "auto"
    lesa.enable(tiny_flux)


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setenv("LESA_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    backend._active.cache_clear()
    with pytest.raises(LesaError, match="LESA_BACKEND='triton': Triton .*; set it to auto"):
        backend.active("cpu")
    assert backend.why_not("native", "mps") == "it does not run on mps."
    backend._active.cache_clear()


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("mix", {2: (5, 4)}, r"table has shape \[5, 4\]; .* it must be \[steps, 3\]"),
        ("mix", {2: (5, 2)}, r"table has shape \[5, 2\]"),
        ("mix_modulate", {2: (5, 3, 24)}, r"table has shape \[5, 3, 24\]; .* \[steps, 3\]"),
        ("spline_mix", {2: (5, 3, 24)}, r"weights has shape \[5, 3, 24\]; .* \[steps, 3\]"),
        ("mix", {1: -1}, "slots name -1 to 1; the ring has slots 0 to 3"),
        ("gram", {2: 4}, "slots name 0 to 4; the ring has slots 0 to 3"),
    ],
)
def test_rows_and_slots_that_do_not_fit_are_refused(forced, name, change, sentence):
    """By every backend alike: a table of another width would be read as something else."""
    arguments, options, exact = calls(torch.float32)[name]
    for place, what in change.items():
        if isinstance(what, tuple):
            arguments[place] = torch.ones(what)
        else:
            arguments[place] = arguments[place].clone()
            arguments[place][0] = what
    out = torch.empty_like(exact, dtype=exact.dtype if name == "gram" else torch.float32)
    with pytest.raises(LesaError, match=sentence):
        getattr(ops, name)(*arguments, out, **options)
