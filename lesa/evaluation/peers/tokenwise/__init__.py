"""Token-wise caches on FLUX: on a skipped step every block computes some of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.evaluation.method import Bench, Method, Use
from lesa.evaluation.peers.tokenwise.blocks import Rotary, run_double, run_single
from lesa.evaluation.peers.tokenwise.memory import Cell, Moment, Rule
from lesa.evaluation.peers.tokenwise.rules import ClusCa, DuCa, ToCa
from lesa.forecasters.published import FORA
from lesa.hooks.attach import controlled
from lesa.hooks.denoiser import Denoiser
from lesa.hooks.pipeline import find_denoiser
from lesa.hooks.wrappers import core_of

__all__ = ["TOKENWISE", "ClusCa", "DuCa", "ToCa", "Tokenwise", "tokenwise"]

_MODEL = "FluxTransformer2DModel"


@dataclass(frozen=True)
class Tokenwise:
    """A rule for the tokens, with every N-th step in full.

    The authors' code for FLUX also computes steps 1 and 2 in full and then every N-th; at 10 of 50
    full steps that is worse for all three (1.2 to 3.0 dB in the mean on 4 prompts of the embedded
    pipeline).
    """

    rule: Rule
    note: str

    takes_lists = True

    def unfit(self, bench: Bench) -> str | None:
        """It is written for the blocks of FLUX."""
        name = None if bench.pipe is None else type(core_of(find_denoiser(bench.pipe))).__name__
        return None if name == _MODEL else f"is written for {_MODEL}, not {name}; leave it out"

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """At the setting with the fewest full steps that are not below `wanted`, or on a list."""
        steps = bench.num_steps
        schedule = searched.bind(steps) if searched else FORA.nearest(wanted, steps)
        return Method(
            name,
            steps,
            schedule=schedule,
            origin="searched" if searched else "own",
            applied=partial(tokenwise, rule=self.rule, schedule=schedule),
            note=f"computes {self.note}",
        )


# ToCa: a mean of 12 % of the tokens over FLUX's blocks, twice as many with one stream as with two
TOKENWISE = {
    "toca": Tokenwise(ToCa(), "12 % of the tokens on skipped steps"),
    "duca": Tokenwise(DuCa(), "12 % of the tokens on every other skipped step"),
    "clusca": Tokenwise(ClusCa(), "16 text and 16 image tokens on skipped steps"),
}


@contextmanager
def tokenwise(pipe: Any, rule: Rule, schedule: Schedule) -> Iterator[Use]:
    """A token-wise cache on a FLUX pipeline for a while.

    Every block instance gets a forward of its own, which computes all tokens at full steps and
    those that `rule` picks at the others; both are gone afterwards.

    Raises: LesaError where an image prompt (IP-Adapter) is given.
    """
    model = find_denoiser(pipe)
    core: Any = core_of(model)
    doubles, singles = core.transformer_blocks, core.single_transformer_blocks
    cache = _Cache(rule, schedule, len(doubles), len(singles))
    with controlled([model], cache, pipe):
        for i, block in enumerate(doubles):
            block.forward = partial(cache.run_block, run_double, block, i)
        for i, block in enumerate(singles, len(doubles)):
            block.forward = partial(cache.run_block, run_single, block, i)
        try:
            yield Use(cache.nbytes)
        finally:
            for block in (*doubles, *singles):
                del block.forward


class _Cache:
    """Controller that keeps a cell of each block and guidance branch, and tells them the step."""

    def __init__(self, rule: Rule, schedule: Schedule, doubles: int, singles: int) -> None:
        self.rule, self.schedule = rule, schedule
        self.doubles, self.singles = doubles, singles
        self.branches: dict[str, list[Cell]] = {}
        self.cells: list[Cell] = []  # of the branch that runs now

    def __call__(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = denoiser.clock.tick(kwargs)
        if step.fresh:
            self.branches.clear()
        if step.branch not in self.branches:
            self.branches[step.branch] = self._new_cells()
        self.cells = self.branches[step.branch]
        moment = self.cells[0].moment
        full = moment.step < 0 or step.problem is not None or self.schedule.is_full(step.index)
        moment.since = 0 if full else moment.since + step.index - moment.step
        moment.step = step.index
        return denoiser.run(args, kwargs).output

    def run_block(
        self,
        run: Callable[..., tuple[Tensor, Tensor]],
        block: Any,
        position: int,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The forward of one block, with the arguments and the results of diffusers' own."""
        if joint_attention_kwargs:
            raise LesaError(
                f"joint_attention_kwargs: {sorted(joint_attention_kwargs)} are not known to "
                "token-wise caches; leave them out, or use another method"
            )
        cell = self.cells[position]
        text, image = run(block, cell, encoder_hidden_states, hidden_states, temb, image_rotary_emb)
        if cell.full and position == self.doubles - 1:
            self.rule.learn(cell.moment, text, image)
        return text, image

    def nbytes(self) -> int:
        """Bytes that all cells hold."""
        return sum(cell.nbytes for cells in self.branches.values() for cell in cells)

    def _new_cells(self) -> list[Cell]:
        moment = Moment(self.schedule.steps / len(self.schedule.full_steps))
        return [
            Cell(self.rule, moment, i / max(count - 1, 1), single)
            for single, count in ((False, self.doubles), (True, self.singles))
            for i in range(count)
        ]
