"""One pipeline on several processes: context, tensor and guidance parallelism, sharded weights.

Processes are real (gloo on the CPU), models tiny. Ring attention itself does not run on a CPU,
whose attention returns no log-sum-exp: what is tested of it is the shard that a rank holds.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import diffusers
import processes
import pytest
import torch
import torch.distributed as dist
from tiny_pipelines import build, run
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import lesa
from lesa.core.schedule import Schedule
from lesa.core.table import Table
from lesa.util.ranks import joined

STEPS, FULL = 6, (0, 2, 5)
PLAN = Schedule.explicit(FULL, STEPS)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # sums of two shards are rounded in another order
MODELS, TAPS = ("flux", "qwen", "wan"), ("output", "hidden")


class Sent(TorchDispatchMode):
    """Counts what is sent between processes, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # what it sends is seen below it
            return NotImplemented
        name = str(func)
        if name.startswith(("_c10d_functional", "c10d")) and "wait" not in name:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def parallel(pipe: Any, **degrees: int) -> Any:
    """The pipeline under diffusers' context parallelism."""
    config = diffusers.ContextParallelConfig(**degrees)
    with mock.patch("torch.accelerator.device_count", return_value=1):  # it divides by none on CPU
        pipe.transformer.enable_parallelism(config=config)
    return pipe


def accelerated(pipe: Any, call: Any, tap: str) -> tuple[torch.Tensor, Any, Counter[str]]:
    """Latents, counters and what was sent of a run that forecasts three of six steps."""
    with lesa.accelerate(pipe, lesa.Taylor(1), schedule=PLAN, tap=tap), Sent() as sent:
        found = run(pipe, call())
        stats = lesa.stats(pipe)
    assert stats.skipped and not stats.fallbacks, stats
    return found, stats, sent.calls


def decided(stats: Any) -> tuple[Any, ...]:
    return stats.full_steps, stats.full, stats.skipped, stats.generations, stats.ring_bytes


def check_like_alone(pipe: Any, alone: Any, call: Any, tap: str, shards: int) -> None:
    """The run of one process, by ranks that decide alike and send nothing for it."""
    expected, one, _ = accelerated(alone, call, tap)
    run(pipe, call(num_inference_steps=1))  # FSDP gathers the outermost weights once
    found, stats, sent = accelerated(pipe, call, tap)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert decided(stats)[:4] == decided(one)[:4]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (decided(stats), sent))
    assert all(one == everyone[0] for one in everyone)
    assert stats.ring_bytes * shards == one.ring_bytes
    with Sent() as plain:
        run(pipe, call())
    calls = stats.full + stats.skipped
    if tap == "output":  # no module runs on a skipped step
        assert {op: n * calls for op, n in sent.items()} == {
            op: n * stats.full for op, n in plain.calls.items()
        }
    else:  # the model's own gathering of the output is all that does
        assert sum(sent.values()) < sum(plain.calls.values())
    assert plain.calls


def ends(ended: list[tuple[int, str]]) -> None:
    assert [code for code, _ in ended] == [0] * len(ended), ended


@processes.needs_fork
def test_ulysses_on_two_processes(tmp_path):
    """At the hidden tap a rank's ring holds its share of the tokens; outputs are gathered before
    the pipeline gets them, so that at the output tap it holds all of an output."""

    for name in MODELS:  # what is imported here, no process imports
        build(name)

    def work(rank: int) -> None:
        with joined():
            for name in MODELS:
                pipe = parallel(build(name)[0], ulysses_degree=2)
                for tap in TAPS:
                    alone, call = build(name)
                    check_like_alone(pipe, alone, call, tap, shards=2 if tap == "hidden" else 1)

    ends(processes.launch(2, work, tmp_path))


@pytest.mark.slow
@processes.needs_fork
def test_ulysses_on_four_processes(tmp_path):
    def work(rank: int) -> None:
        with joined():
            for name in MODELS:
                pipe = parallel(with_four_heads(name)[0], ulysses_degree=4)
                alone, call = with_four_heads(name)
                check_like_alone(pipe, alone, call, "hidden", shards=4)

    ends(processes.launch(4, work, tmp_path))


def with_four_heads(name: str) -> tuple[Any, Any]:
    """A pipeline and a call whose heads and text tokens can be dealt to four processes."""
    pipe, call = build(name)
    config = {**pipe.transformer.config, "num_attention_heads": 4}
    torch.manual_seed(0)
    pipe.transformer = type(pipe.transformer).from_config(config).eval()

    def cut(**more: Any) -> dict[str, Any]:
        given = call(**more)
        texts = [key for key, value in given.items() if getattr(value, "shape", ())[1:2] == (6,)]
        return given | {key: given[key][:, :4] for key in texts}

    return pipe, cut


@processes.needs_fork
def test_a_rank_of_a_ring_keeps_its_own_tokens(tmp_path):
    """The hooks of `ring_degree=2`, with attention among a rank's own tokens in ring attention's
    place: what lesa caches, mixes and hands on is the same as under it."""

    def work(rank: int) -> None:
        with joined():
            for name in MODELS:
                pipe, call = build(name)
                parallel(pipe, ring_degree=2)
                for processor in pipe.transformer.attn_processors.values():
                    processor._parallel_config = None
                plain = run(pipe, call())
                every = Schedule.explicit(range(STEPS), STEPS)
                with lesa.accelerate(pipe, lesa.Taylor(1), schedule=every, tap="hidden"):
                    assert torch.equal(run(pipe, call()), plain)
                found, stats, _ = accelerated(pipe, call, "hidden")
                _, whole, _ = accelerated(*build(name), "hidden")
                assert 2 * stats.ring_bytes == whole.ring_bytes
                everyone: list[Any] = [None, None]
                dist.all_gather_object(everyone, (found, decided(stats)))
                assert torch.equal(everyone[0][0], everyone[1][0])
                assert everyone[0][1] == everyone[1][1]

    ends(processes.launch(2, work, tmp_path))


@processes.needs_fork
def test_sharded_weights_and_tensor_parallelism(tmp_path):
    def work(rank: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        with joined():
            mesh = init_device_mesh("cpu", (2,))
            for tap in TAPS:
                pipe, call = build("flux")
                model = pipe.transformer
                for block in (*model.transformer_blocks, *model.single_transformer_blocks):
                    fully_shard(block, mesh=mesh)
                fully_shard(model, mesh=mesh)
                check_like_alone(pipe, build("flux")[0], call, tap, shards=1)
            pipe, call = build("flux")
            for block in pipe.transformer.transformer_blocks:
                plan = {"ff.net.0.proj": ColwiseParallel(), "ff.net.2": RowwiseParallel()}
                parallelize_module(block, mesh, plan)
            check_like_alone(pipe, build("flux")[0], call, "output", shards=1)

    ends(processes.launch(2, work, tmp_path))


class ByBranch(lesa.Reuse):
    """A forecaster whose guidance branches have coefficients of their own."""

    def table(self, schedule: Schedule, sigmas: Any = (), branch: str = "cond") -> Table:
        weight = 0.9 if branch == "uncond" else 1.0
        return Table.from_rows(schedule, 1, lambda step, cached: [weight])


@processes.needs_fork
def test_a_guidance_branch_on_each_process(tmp_path):
    """Each rank runs one branch, under its name, and gets the other's output."""

    def work(rank: int) -> None:
        with joined():
            alone, call = build("qwen")
            expected = guided(alone, call(), ("cond", "uncond"))
            own = ("cond", "uncond")[rank]
            found = guided(build("qwen")[0], call(), (own,))
            assert torch.equal(found, expected)

    ends(processes.launch(2, work, tmp_path))


def guided(pipe: Any, call: dict[str, Any], own: tuple[str, ...]) -> torch.Tensor:
    """A loop that runs some of two branches; the others' outputs come from other ranks."""
    draw = torch.Generator().manual_seed(0)
    latents, model = torch.randn(1, 4, 16, generator=draw), pipe.transformer
    pipe.scheduler.set_timesteps(STEPS, mu=0.5)
    embeds = {"cond": call["prompt_embeds"], "uncond": call["negative_prompt_embeds"]}
    with lesa.accelerate(pipe, ByBranch(), schedule=PLAN), torch.no_grad():
        for level in pipe.scheduler.timesteps:
            outputs = {}
            for name in own:
                with model.cache_context(name):
                    outputs[name] = model(
                        latents,
                        timestep=level.expand(1) / 1000,
                        encoder_hidden_states=embeds[name],
                        encoder_hidden_states_mask=call["prompt_embeds_mask"],
                        img_shapes=[[(1, 2, 2)]],
                        return_dict=False,
                    )[0]
            if len(own) == 1:
                everyone: list[Any] = [None, None]
                dist.all_gather_object(everyone, outputs)
                outputs = everyone[0] | everyone[1]
            mixed = outputs["uncond"] + 4 * (outputs["cond"] - outputs["uncond"])
            latents = pipe.scheduler.step(mixed, level, latents, return_dict=False)[0]
        stats = lesa.stats(pipe)
    assert not stats.fallbacks and stats.skipped == len(own) * (STEPS - len(FULL)), stats
    return latents
