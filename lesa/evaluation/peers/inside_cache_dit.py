"""lesa's own table run by cache-dit (`lesa.integrations.cache_dit`): one more block a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from lesa.core.schedule import Schedule
from lesa.evaluation.method import Bench, Method, Peer, Use
from lesa.evaluation.peers.cache_dit import DBCACHES, enabled
from lesa.evaluation.peers.diffusers_caches import calls_in_a_step
from lesa.evaluation.ranking import IN_ENGINE
from lesa.forecasters.prior import Prior
from lesa.integrations.cache_dit import configs

__all__ = ["INSIDE"]


class InsideCacheDit:
    """The bench's forecaster where it was trained on what the blocks return, else the prior."""

    takes_lists = True

    def unfit(self, bench: Bench) -> str | None:
        """It needs what a mask of cache-dit needs."""
        return DBCACHES["dbcache-scm"].unfit(bench)

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """With exactly the wanted number of full steps, or on a given list."""
        trained = getattr(bench.forecaster, "tap", None) == "hidden"
        forecaster = bench.forecaster if trained else Prior()
        schedule = None if searched is None else searched.bind(bench.num_steps)
        options = {"full_steps": wanted} if schedule is None else {"schedule": schedule}
        applied = partial(
            _applied,
            num_steps=bench.num_steps,
            forecaster=forecaster,
            separate_cfg=calls_in_a_step(bench) > 1,
            **options,
        )
        return Method(
            name,
            bench.num_steps,
            schedule=schedule,
            origin="own" if schedule is None else "searched",
            applied=applied,
            wanted=wanted,
            note=f"{forecaster.name} at the hidden tap",
        )


INSIDE: dict[str, Peer] = {IN_ENGINE: InsideCacheDit()}


@contextmanager
def _applied(pipe: Any, num_steps: int, forecaster: Any, **options: Any) -> Iterator[Use]:
    with enabled(pipe, num_steps, **configs(pipe, forecaster, **options)) as use:
        yield use
