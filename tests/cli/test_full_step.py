"""Attention backends and compiled blocks: in Python, and as options of the commands."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from tiny_pipelines import build, run
from training_jobs import make
from typer.testing import CliRunner

import lesa
from lesa import Schedule, Taylor, testbed
from lesa.api import find_denoiser
from lesa.cli import app, full_step
from lesa.cli.full_step import FullStep, attention_backends, compile_blocks, set_attention, why_not
from lesa.cli.inputs import default_device, load_pipeline

STEPS = ("--num-inference-steps", "4")
OTHER = "_native_math"  # another way through attention that a CPU has too


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Blocks are traced and run as they are; diffusers' last backend, global, is put back."""
    monkeypatch.setattr(full_step, "COMPILE", {"backend": "eager"})
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.NATIVE)
    torch.compiler.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        yield
    torch.compiler.reset()


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(testbed.captions(2, seed=9)))
    return path


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def refused(*args) -> str:
    """The one line that bad input gets, with exit status 2."""
    result = invoke(*args)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    *before, line = result.stderr.splitlines()
    assert all(re.fullmatch(r"load: [\d.]+ s", phase) for phase in before), result.stderr
    return line


def test_backends_are_diffusers_own_and_tried():
    found = attention_backends("cpu", torch.float32)
    assert set(found) == {backend.value for backend in AttentionBackendName}
    assert found["native"] == found[OTHER] == ""
    assert found["_native_cudnn"]  # the package is there, the device is not
    assert "flash-attn" in why_not("flash") or torch.cuda.is_available()


def test_env_lists_backends_with_reasons():
    facts = json.loads(invoke("env", "--json").stdout)
    assert "native" in facts["attention"] and "native" not in facts["no attention"]
    assert set(facts["attention"]) | set(facts["no attention"]) == set(attention_backends())
    text = invoke("env").stdout
    assert "attention  flex, native" in text
    assert (
        "no attention  flash, flash_varlen: install flash-attn" in text or torch.cuda.is_available()
    )


@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_a_forecaster_serves_another_backend_than_it_was_trained_with(tap):
    pipe, call = make("flux")
    del call["true_cfg_scale"]
    trained = lesa.train(
        pipe, ["a", "b"], 6, 3, tap=tap, form="table", refine=0, polish=0, call=call, progress=False
    )
    arguments = {**call, "num_inference_steps": 6, "output_type": "latent"}

    def picture():
        return run(pipe, arguments | {"generator": torch.Generator().manual_seed(1)})

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lesa.enable(pipe, trained, full_steps=3)
        expected = picture()
        set_attention(pipe, OTHER)
        served = picture()
    assert not torch.equal(served, expected)  # another sum, so it is at work
    torch.testing.assert_close(served, expected, rtol=1e-3, atol=1e-4)
    assert lesa.stats(pipe).fallbacks == {} and lesa.stats(pipe).skipped == 6


def test_training_goes_through_compiled_blocks():
    pipe, call = make("qwen")
    options = dict(form="table", refine=1, polish=1, call=call, progress=False)
    plain = lesa.train(pipe, ["a", "b"], 6, 3, **options)
    compile_blocks(pipe)
    compiled = lesa.train(pipe, ["a", "b"], 6, 3, **options)
    (first,), (second,) = plain.calibrations, compiled.calibrations
    assert first.schedule == second.schedule
    for branch in plain.branches:
        torch.testing.assert_close(
            compiled.table(second.schedule, second.sigmas, branch).coefficients,
            plain.table(first.schedule, first.sigmas, branch).coefficients,
        )


@pytest.mark.parametrize(("order", "tap"), [("before", "hidden"), ("after", "output")])
@pytest.mark.parametrize("name", ["flux", "qwen", "hunyuan-video", "sdxl", "pixart"])
def test_blocks_compiled_before_or_after_enable(name, tap, order):
    """Also where compiled code exists already; diffusers names no repeated blocks of PixArt."""
    pipe, call = build(name)
    plain = run(pipe, call())
    options = dict(schedule=Schedule.fora(3), tap=tap)
    with lesa.accelerate(pipe, Taylor(1), **options):
        expected = run(pipe, call())
    if order == "before":
        compile_blocks(pipe)
        torch.testing.assert_close(run(pipe, call()), plain)
    with lesa.accelerate(pipe, Taylor(1), **options):
        if order == "after":
            compile_blocks(pipe)
        for _ in range(2):
            torch.testing.assert_close(run(pipe, call()), expected)
        assert lesa.stats(pipe).fallbacks == {} and lesa.stats(pipe).skipped > 0
    torch.testing.assert_close(run(pipe, call()), plain)
    model = find_denoiser(pipe)
    assert any(module._compiled_call_impl for module in model.modules())


def test_hooks_that_come_after_compilation_are_run():
    """Peers of `lesa compare` and its counting of full steps look into the blocks."""
    pipe, call = build("pixart")
    compile_blocks(pipe)
    run(pipe, call())
    seen = set()
    inside = pipe.transformer.transformer_blocks[0].attn1.to_q
    with inside.register_forward_hook(lambda *_: seen.add("hook")):
        run(pipe, call())
    assert seen


def test_generate_and_compare_with_both_options(prompts, tmp_path):
    options = ("--attention-backend", OTHER, "--compile", *STEPS, "--full-steps", "2")
    facts = tmp_path / "facts.json"
    given = ("--prompts", prompts, "--out", tmp_path / "out", "--json", facts)
    result = invoke("generate", "testbed", *given, *options, "--forecaster", "fora")
    assert result.exit_code == 0, result.output
    told = json.loads(facts.read_text())
    assert told["attention_backend"] == OTHER and told["compile"] is True
    assert len(told["files"]) == 2 and told["stats"]["skipped"] == 2
    given = ("--pipeline", "testbed", "--prompts", prompts, "--methods", "fora")
    told = json.loads(invoke("compare", *given, *options, "--json").stdout)
    assert f"All runs with attention-backend {OTHER!r} and compile" in told["notes"]
    assert told["rows"][0]["full_steps"] == 2


def test_train_hands_both_options_on(prompts, tmp_path, monkeypatch):
    def stop(pipe, *_, **__):
        block = pipe.transformer.transformer_blocks[0]
        compiled = block._compiled_call_impl is not None
        raise lesa.LesaError(f"{block.attn.processor._attention_backend.value} {compiled}")

    monkeypatch.setattr("lesa.train", stop)
    given = ("--prompts", prompts, "--out", tmp_path / "out", *STEPS, "--full-steps", "2")
    line = refused("train", "testbed", *given, "--attention-backend", OTHER, "--compile")
    assert line == f"lesa: {OTHER} True"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--attention-backend", "flosh"), "attention-backend='flosh': unknown; choose from"),
        (("--attention-backend", "xformers"), "install xformers>="),
        (("--attention-backend", "_native_cudnn"), "'_native_cudnn': not usable on cpu in float32"),
        (("--device", "cuda:9"), "device='cuda:9': not usable here"),
        (("--device", "tpu0"), "device='tpu0': unknown; give one of: cpu"),
        (("--compile",), "compile=True: torch.compile does not work on cpu (no compiler); leave"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "train", "compare"])
def test_what_cannot_be_had_is_told_before_any_work(
    command, options, words, prompts, tmp_path, monkeypatch
):
    def no_compiler(*_, **__):
        raise RuntimeError("no compiler\nand a long explanation")

    monkeypatch.setattr("torch.compile", no_compiler)
    monkeypatch.setattr(
        "lesa.cli.inputs.load_pipeline", lambda *_, **__: pytest.fail("work was begun")
    )
    out = tmp_path / "out"
    place = ("testbed", "--out", out)
    if command == "compare":
        place = ("--pipeline", "testbed", "--report", out)
    if command != "generate":
        place = (*place, "--full-steps", "2")
    line = refused(command, *place, "--prompts", prompts, *STEPS, *options)
    assert words in line
    assert not out.exists()


def test_a_denoiser_that_takes_no_attention_backend():
    pipe, _ = build("sdxl")
    with pytest.raises(lesa.LesaError, match=f"{OTHER}': it has no effect on UNet2DConditionModel"):
        set_attention(pipe, OTHER)


def test_a_backend_that_the_denoiser_cannot_run_with(prompts, tmp_path, monkeypatch):
    """As flash-attn with a mask: told after two steps, with nothing written."""

    def no_mask(*_, **__):
        raise ValueError("attn_mask is not supported")

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName(OTHER), no_mask)
    monkeypatch.setattr(full_step, "why_not", lambda *_: "")
    given = ("--prompts", prompts, "--out", tmp_path / "out", *STEPS)
    line = refused("generate", "testbed", *given, "--attention-backend", OTHER)
    assert "FluxPipeline cannot run with it here (attn_mask is not supported); choose" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ..."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 2 bytes"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("options", [(), ("--attention-backend", OTHER)])
def test_a_device_that_is_too_small(error, options, prompts, tmp_path, monkeypatch):
    """Also in the two steps of the warm-up, whose other errors blame the backend."""

    def full(*_, **__):
        raise error

    monkeypatch.setattr("lesa.hooks.timed_run.generate", full)
    given = ("--prompts", prompts, "--out", tmp_path / "out", *STEPS, *options)
    line = refused("generate", "testbed", *given)
    assert line.startswith(f"lesa: device={default_device()!r}: it has too little memory (")
    assert "; lower --batch-size, --height, --width or take a larger device" in line
    testbed.load().save_pretrained(tmp_path / "own")
    own = ("generate", tmp_path / "own", *given, "--height", 64, "--width", 64)
    assert "--width or give --dtype bfloat16 or take" in refused(*own)
    assert not (tmp_path / "out").exists()


def test_another_error_is_not_taken_for_a_small_device(prompts, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("lesa.hooks.timed_run.generate", broken)
    result = invoke("generate", "testbed", "--prompts", prompts, "--out", tmp_path / "out", *STEPS)
    assert isinstance(result.exception, RuntimeError)


def test_load_pipeline_switches_on_what_it_is_given():
    pipe = load_pipeline("testbed", device="cpu", full_step=FullStep(OTHER, compile=True))
    block = pipe.transformer.transformer_blocks[0]
    assert block.attn.processor._attention_backend == OTHER
    assert block._compiled_call_impl is not None
