"""Counted operations: against sums by hand, and against the paper's columns."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from lesa.errors import LesaError
from lesa.evaluation.flops import call_cost, flops_rows, step_cost
from lesa.evaluation.full_size import MODELS

IMAGE, TEXT, WIDTH, CHANNELS, PROMPT, POOLED = 48, 16, 32, 8, 24, 12
DOUBLE, SINGLE = 2, 3
PARAMETERS = {"flux.1-dev": 11_901_408_320, "sdxl": 2_567_463_684}  # of the published weights


rows_of = cache(flops_rows)


def linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def tiny_flux(double: int, single: int) -> FluxTransformer2DModel:
    with torch.device("meta"):
        return FluxTransformer2DModel(
            in_channels=CHANNELS, num_layers=double, num_single_layers=single,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=PROMPT,
            pooled_projection_dim=POOLED, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip


def tiny_call() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return {
            "hidden_states": torch.empty(1, IMAGE, CHANNELS),
            "encoder_hidden_states": torch.empty(1, TEXT, PROMPT),
            "pooled_projections": torch.empty(1, POOLED),
            "timestep": torch.empty(1),
            "guidance": torch.empty(1),
            "img_ids": torch.empty(IMAGE, 3),
            "txt_ids": torch.empty(TEXT, 3),
        }


@pytest.fixture(scope="module")
def tiny():
    numbers = {"transformer_blocks": DOUBLE, "single_transformer_blocks": SINGLE}
    return call_cost(tiny_flux(1, 1), tiny_call(), numbers, adapter_rank=4)


def by_hand() -> tuple[int, int]:
    """A tiny FLUX in full, and the part of it that the hidden tap leaves."""
    tokens = IMAGE + TEXT
    attention = 2 * linear(tokens, tokens, WIDTH)  # q k^T and the weights times v
    times = 2 * (linear(1, 256, WIDTH) + linear(1, WIDTH, WIDTH))  # time and guidance
    embedding = times + linear(1, POOLED, WIDTH) + linear(1, WIDTH, WIDTH)
    double = 2 * linear(1, WIDTH, 6 * WIDTH) + 4 * linear(tokens, WIDTH, WIDTH) + attention
    double += linear(tokens, WIDTH, 4 * WIDTH) + linear(tokens, 4 * WIDTH, WIDTH)
    single = linear(1, WIDTH, 3 * WIDTH) + 3 * linear(tokens, WIDTH, WIDTH) + attention
    single += linear(tokens, WIDTH, 4 * WIDTH) + linear(tokens, 5 * WIDTH, WIDTH)
    inputs = linear(IMAGE, CHANNELS, WIDTH) + linear(TEXT, PROMPT, WIDTH)
    tail = linear(1, WIDTH, 2 * WIDTH) + linear(IMAGE, WIDTH, CHANNELS)
    return inputs + embedding + DOUBLE * double + SINGLE * single + tail, embedding + tail


def test_a_tiny_flux_by_hand(tiny):
    full, tail = by_hand()
    assert tiny.full == full
    assert tiny.skipped["output"] == 2 * (3 + 1) * IMAGE * CHANNELS  # the mix, with the latent
    assert tiny.skipped["hidden"] == tail + 2 * 3 * IMAGE * WIDTH
    assert tiny.cache_bytes == {"output": 6 * IMAGE * CHANNELS, "hidden": 6 * IMAGE * WIDTH}


def test_an_adapter_by_hand(tiny):
    """B A x with A [r, in] and B [out, r], for every linear layer of the blocks."""
    tokens, rank, sums = IMAGE + TEXT, 4, {"double": 0, "single": 0}
    sums["double"] = 2 * 7 * WIDTH + tokens * (4 * 2 * WIDTH + 2 * 5 * WIDTH)
    sums["single"] = 4 * WIDTH + tokens * (3 * 2 * WIDTH + 5 * WIDTH + 6 * WIDTH)
    assert tiny.adapter == 2 * rank * (DOUBLE * sums["double"] + SINGLE * sums["single"])


def test_one_block_of_each_kind_stands_for_all(tiny):
    model, counter = tiny_flux(DOUBLE, SINGLE), FlopCounterMode(display=False)
    with torch.no_grad(), torch.device("meta"), counter:
        model(**tiny_call())
    assert tiny.full == counter.get_total_flops()


@pytest.mark.parametrize("name", PARAMETERS)
def test_configurations_have_the_published_number_of_parameters(name):
    row = MODELS[name]
    model = row.build()
    found = sum(p.numel() for p in model.parameters())
    for blocks, field in row.layers.items():
        one = sum(p.numel() for p in model.get_submodule(blocks).parameters())
        found += (row.config[field] - 1) * one
    assert found == PARAMETERS[name]


def test_the_papers_numbers_of_flux():
    rows = rows_of("flux.1-dev")
    assert rows[0]["tflops_full_step"] == pytest.approx(74.54, rel=0.01)
    assert rows[0]["tflops"] == pytest.approx(2 * 1859.62, rel=1e-5)  # its multiply-accumulates
    totals = {(row["full_steps"], row["tap"]): row["tflops"] for row in rows}
    paper = {50: 3726.87, 13: 969.11, 10: 745.51, 8: 596.44}
    assert {count for count, _ in totals} == set(paper)
    for (count, _), total in totals.items():
        assert total == pytest.approx(paper[count], rel=0.01)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("flux.1-dev", "sdxl")])
def test_the_papers_columns_of_the_others(name):
    """Lightning only with its unfused adapter, as the paper's code runs it."""
    rows = rows_of(name)
    key = "deviation_adapter" if name == "qwen-image-lightning" else "deviation"
    assert all(abs(row[key]) < 0.01 for row in rows)
    assert len(rows) == 1 + 2 * len(MODELS[name].full_steps)


@pytest.mark.parametrize("name", MODELS)
def test_a_skipped_step_is_a_small_part_of_a_full_one(name):
    """A U-Net's hidden tap runs convolutions at the full resolution, the others' one projection."""
    bounds = {"output": 1e-6, "hidden": 0.02 if name == "sdxl" else 0.01}
    _, *rows = rows_of(name)
    for row in rows:
        share = row["tflops_skipped_step"] / row["tflops_full_step"]
        assert 0 < share < bounds[row["tap"]]


def test_totals_sizes_and_counts_follow_what_is_asked():
    plain, output, hidden = flops_rows(
        "hunyuanvideo", full_steps=[7], num_steps=30, height=320, width=512, frames=33
    )
    assert plain["tokens"] == [9 * 20 * 32, 256]
    assert plain["tflops"] == pytest.approx(30 * plain["tflops_full_step"])
    for row in (output, hidden):
        spent = 7 * row["tflops_full_step"] + 23 * row["tflops_skipped_step"]
        assert row["tflops"] == pytest.approx(spent)
        assert row["speedup"] == pytest.approx(plain["tflops"] / row["tflops"])
        assert row["paper_tflops"] is None and row["deviation"] is None
    assert output["cache_bytes"] == 3 * 2 * 16 * 9 * 40 * 64  # K, bytes, channels, frames, latent
    assert hidden["cache_bytes"] == 3 * 2 * 9 * 20 * 32 * 3072


def test_both_guidance_branches_count():
    one, two = MODELS["qwen-image-lightning"], MODELS["qwen-image"]
    single = step_cost(one, one.size)
    double = step_cost(two, one.size)
    assert double.cache_bytes["hidden"] == 2 * single.cache_bytes["hidden"]
    assert double.full == pytest.approx(2 * single.full, rel=0.01)


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("flux.2", {}, "choose from flux.1-dev"),
        ("flux.1-dev", {"frames": 65}, "frames=65: a model of pictures takes none"),
        ("flux.1-dev", {"height": 1000}, "height=1000: not a multiple of 16"),
        ("flux.1-dev", {"width": 0}, "width=0: not a multiple of 16"),
        ("hunyuanvideo", {"frames": 64}, "frames=64: not 1 more"),
        ("flux.1-dev", {"full_steps": [60]}, "full-steps=60: 60 of 50 steps"),
        ("flux.1-dev", {"num_steps": 0}, "num-inference-steps=0: not a whole number >= 1"),
    ],
)
def test_bad_input(model, options, words):
    with pytest.raises(LesaError, match=words):
        flops_rows(model, **options)
