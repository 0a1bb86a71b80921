"""What lesa promises of every denoiser class: the tests and the table of docs/models.md run these.

A check takes what `tiny_pipelines.build` gives and raises AssertionError where a promise is broken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from tiny_pipelines import run
from torch import nn

import lesa
from lesa.api import find_denoiser
from lesa.hooks.attach import attach, detach
from lesa.hooks.model_specs import ModelSpec, model_spec

SCHEDULE = lesa.Schedule.explicit([0, 2, 3])  # of six: single ones, neighbours, a skipped end

Call = Callable[..., dict[str, Any]]


def check_reuse_is_exact(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Without its blocks, on the feature of the same inputs, a model gives the same output."""
    counts = executions(model)
    with torch.no_grad():
        expected = list(tensors(model(*args, **kwargs)))
        plain = Counter(counts)
        attach(model, ReuseFromSecond())
        full, skipped = (list(tensors(model(*args, **kwargs))) for _ in range(2))
        detach(model)
        after = list(tensors(model(*args, **kwargs)))
    assert plain and counts == {block: 3 * count for block, count in plain.items()}
    for found in (full, skipped, after):
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def check_full_steps_are_plain(pipe: Any, call: Call) -> None:
    """Interval 1 is the plain run bit for bit, and switching off leaves no trace."""
    model = find_denoiser(pipe)
    expected = run(pipe, call())  # first: in it diffusers gives the model a hook registry
    before = fingerprint(model)
    with lesa.accelerate(pipe, lesa.Reuse(), schedule=lesa.Schedule.every(1)):
        assert torch.equal(run(pipe, call()), expected)
        stats = lesa.stats(pipe)
    assert stats.full and not stats.skipped and not stats.fallbacks, stats
    assert fingerprint(model) == before
    assert torch.equal(run(pipe, call()), expected)


def check_skips(pipe: Any, call: Call, tap: Any, steps: int = 6) -> None:
    """Blocks run on the full ones of the executed steps only; a second generation is the first."""
    counts = executions(find_denoiser(pipe))
    run(pipe, call())
    plain = Counter(counts)
    counts.clear()
    with lesa.accelerate(pipe, lesa.Reuse(), schedule=SCHEDULE, tap=tap):
        first, second = run(pipe, call()), run(pipe, call())
        stats = lesa.stats(pipe)
    assert not stats.fallbacks and stats.tap == tap and stats.num_steps == steps, stats
    full = len(SCHEDULE.bind(steps).full_steps)
    assert plain and counts == {block: 2 * n * full // steps for block, n in plain.items()}
    assert torch.equal(first, second)


class ReuseFromSecond:
    """A controller that runs the first call and injects its feature into all later ones."""

    feature: torch.Tensor | None = None

    def __call__(self, denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.feature is None:
            output, self.feature, _ = denoiser.run(args, kwargs, tap=True)
            return output
        return denoiser.run_tail(self.feature, args, kwargs).output


def first_call(pipe: Any, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the denoiser is called with at the first step of a plain run."""
    seen: list[tuple[Any, Any]] = []
    handle = find_denoiser(pipe).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    run(pipe, arguments)
    handle.remove()
    return seen[0]


def executions(model: nn.Module) -> Counter[str]:
    """Counts, from now on, the executions of each block and of what a skipped step passes by."""
    spec, counts = model_spec(model), Counter[str]()
    for name, module in watched(model, spec):
        module.register_forward_hook(lambda *_, name=name: counts.update([name]))
    return counts


def watched(model: nn.Module, spec: ModelSpec) -> Iterator[tuple[str, nn.Module]]:
    """What a skipped step does not run, by name."""
    for name in spec.blocks:
        for position, block in enumerate(model.get_submodule(name)):
            yield f"{name}.{position}", block
    for name in spec.last:
        with suppress(AttributeError):
            for position, block in enumerate(list(spec.module(model, name))[:-1]):
                yield f"{name}.{position}", block
    for name in spec.identities:
        yield name, model.get_submodule(name)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that switching on touches."""
    parts = {
        name: (type(part), set(vars(part)), len(part._forward_pre_hooks), type(part).__call__)
        for name, part in model.named_modules()
    }
    return parts | {"keys": list(model.state_dict()), "forward": model.forward}


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a model's output, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif value is not None:
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)
