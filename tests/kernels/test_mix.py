from __future__ import annotations

import pytest
import torch
from lesa_kernels.config import Config
from lesa_kernels.mix import _flat_kernel, mix
from lesa_testbed import reference

from lesa.engine.ring import Ring

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ONE = Config(1024, 128, 1)
SEVERAL = Config(256, 128, 3)  # a persistent grid of three programs
EACH = Config(256, 64, 100)  # a program for each tile
SHAPE = (5, 7, 29)


def exact(*args, **kwargs):
    out = torch.empty(args[0].shape[1:], dtype=torch.float64, device=args[0].device)
    return reference.mix(*args, out, **kwargs)


@pytest.mark.parametrize("history", range(1, 9))
def test_every_history_and_dtype(history, rand, integers, poisoned, rounded_once):
    dtype = DTYPES[history % 3]
    ring = rand(history + 2, *SHAPE, dtype=dtype)
    slots = integers(*(i % (history + 2) for i in range(3, 3 + history)))
    table, step = rand(4, history), integers(2)
    out = mix(ring, slots, table, step, poisoned(*SHAPE, dtype=dtype), config=ONE)
    rounded_once(out, exact(ring, slots, table, step), 4 * history)


@pytest.mark.parametrize("size", [1, 63, 100, 4097])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tails(size, dtype, rand, integers, poisoned, rounded_once):
    ring, slots, table, step = rand(3, size, dtype=dtype), integers(2, 0), rand(1, 2), integers(0)
    for config in (SEVERAL, EACH):
        frame = poisoned(size + 32, dtype=dtype)
        out = mix(ring, slots, table, step, frame[16:-16], config=config)
        rounded_once(out, exact(ring, slots, table, step), 8)
        assert frame[:16].isnan().all() and frame[-16:].isnan().all()


def test_latent_bias_and_a_step_of_64_bits(rand, integers, poisoned, rounded_once):
    ring, latent = rand(3, *SHAPE, dtype=torch.bfloat16), rand(*SHAPE)
    slots, table, bias, step = integers(1, 2), rand(4, 3), rand(4), integers(3).long()
    for dtype, config in zip(DTYPES, (ONE, SEVERAL, EACH), strict=True):
        out = poisoned(*SHAPE, dtype=dtype)
        mix(ring, slots, table, step, out, latent=latent, bias=bias, config=config)
        rounded_once(out, exact(ring, slots, table, step, latent=latent, bias=bias), 12)


def test_what_has_no_weight_is_not_used(rand, integers, poisoned, rounded_once):
    ring, latent = rand(4, *SHAPE), poisoned(*SHAPE)
    ring[1], ring[3] = torch.nan, torch.inf
    table, slots, step = torch.tensor([[0.5, 0, 2, 0]]), integers(0, 1, 2), integers(0)
    table = table.to(ring.device)
    for config in (SEVERAL, EACH):
        out = mix(ring, slots, table, step, poisoned(*SHAPE), latent=latent, config=config)
        rounded_once(out, 0.5 * ring[0].double() + 2 * ring[2].double(), 8)
    bands = table[..., None].repeat(1, 1, 29).contiguous()
    bands[..., ::2] = torch.tensor([1.0, 0, 0, 0], device=ring.device)[:, None]
    out = mix(ring, slots, bands, step, poisoned(*SHAPE), latent=latent, config=ONE)
    rounded_once(out, exact(ring, slots, bands, step, latent=latent), 8)


@pytest.mark.parametrize(("bands", "band_size"), [(29, None), (7, 29), (35, 29), (5, 203), (3, 1)])
def test_bands(bands, band_size, rand, integers, poisoned, rounded_once):
    shape = SHAPE if bands != 3 else (4, 33)
    ring = rand(3, *shape, dtype=torch.bfloat16)
    slots, table, bias, step = integers(2, 0), rand(3, 3, bands), rand(3, bands), integers(1)
    options = {"latent": rand(*shape), "bias": bias, "band_size": band_size}
    out = poisoned(*shape, dtype=torch.bfloat16)
    mix(ring, slots, table, step, out, config=SEVERAL, **options)
    rounded_once(out, exact(ring, slots, table, step, **options), 16)


def test_channel_groups_are_adjacent_channels(rand, integers, poisoned):
    ring, table = rand(1, 4, 6), torch.tensor([[[1.0, 10.0, 100.0]]])
    out = mix(ring, integers(0), table.to(ring.device), integers(0), poisoned(4, 6), config=ONE)
    factors = torch.tensor([1.0, 1, 10, 10, 100, 100], device=ring.device)
    torch.testing.assert_close(out, ring[0] * factors, rtol=1e-7, atol=0)


def test_in_place_over_the_evicted_slot_around_the_ring(rand, integers, rounded_once):
    ring = Ring(3, rand(*SHAPE, dtype=torch.bfloat16))
    for _ in range(3):
        ring.push(rand(*SHAPE, dtype=torch.bfloat16))
    table = rand(1, 3) / 3
    for _ in range(4):
        expected = exact(ring.data, ring.slots, table, integers(0))
        oldest = ring.data[ring.order[-1]]
        mix(ring.data, ring.slots, table, integers(0), oldest, config=SEVERAL)
        rounded_once(oldest, expected, 12)
        ring.push(oldest.clone())  # goes to the same slot
        assert torch.equal(ring.data[ring.slots[0]], oldest)


def test_a_replay_sees_new_step_slots_and_table(rand, integers, poisoned, rounded_once):
    ring, slots, table, step = rand(4, 50), integers(0, 1), rand(3, 2), integers(0)
    out = poisoned(50)
    for target, value in ((step, integers(2)), (slots, integers(3, 0)), (table, -table)):
        target.copy_(value)
        mix(ring, slots, table, step, out, config=ONE)
        rounded_once(out, exact(ring, slots, table, step), 8)


def test_reuse_returns_the_newest_and_polynomials_are_extrapolated(rand, integers, poisoned):
    first, second, third = (torch.round(8 * rand(300)) for _ in range(3))
    ring = torch.stack([first + t * second + t * t * third for t in range(3)])
    rows = torch.tensor([[1.0, 0, 0], [2, -1, 0], [3, -3, 1]], device=ring.device)
    results = [
        mix(ring, integers(2, 1, 0), rows, integers(s), poisoned(300), config=ONE) for s in range(3)
    ]
    assert torch.equal(results[0], ring[2])
    assert torch.equal(results[1], 2 * ring[2] - ring[1])
    assert torch.equal(results[2], first + 3 * second + 9 * third)


def test_an_empty_feature(rand, integers):
    out = torch.empty(0, 8, device=rand(1).device)
    assert mix(rand(2, 0, 8), integers(0), rand(1, 1), integers(0), out) is out


def test_offsets_beyond_32_bits(tmp_path, device, poisoned):
    if device.type != "cpu":
        pytest.skip("reads a sparse file")
    size = 2**30 + 16  # elements of a slot: the third one begins beyond 31 bits
    ring = torch.from_file(str(tmp_path / "ring"), shared=True, size=3 * size, dtype=torch.float16)
    ring[2 * size : 2 * size + 64] = torch.arange(64)
    zero = torch.zeros(1, dtype=torch.int32)
    for once in (False, True):
        out = poisoned(64, dtype=torch.float16)
        _flat_kernel[(1,)](
            out, ring, zero + 2, torch.ones(1, 1), zero, None, None, size, 1, K=1, BLOCK=64,
            ONCE=once,
        )  # fmt: skip
        assert torch.equal(out, torch.arange(64).half())
