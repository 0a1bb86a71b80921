"""The methods that are compared, behind one interface: a forecaster and the steps that run in full.

Each peer comes with its own published rule for the full steps; formulas in docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lesa.errors import LesaError
from lesa.forecasters.hicache import HiCache
from lesa.forecasters.reuse import Reuse
from lesa.forecasters.spectrum import Spectrum
from lesa.forecasters.taylor import Taylor
from lesa.inputs import check_count
from lesa.schedule import Schedule

Origin = Literal["own", "searched"]


@dataclass(frozen=True)
class Method:
    """One contender: its forecaster and bound schedule; neither of them for "fewer-steps".

    A peer that is no forecaster brings `own_cache`: pipeline -> context manager that gives a
    function which tells the bytes held.
    """

    name: str
    num_steps: int
    forecaster: Any = None
    schedule: Schedule | None = None
    origin: Origin = "own"
    own_cache: Callable[[Any], AbstractContextManager[Callable[[], int]]] | None = None

    @property
    def full_steps(self) -> int:
        """How many steps run the whole model."""
        return len(self.schedule.full_steps) if self.schedule else self.num_steps

    @property
    def schedule_text(self) -> str:
        """Where the full steps come from, and which they are: "own: 0,7,14" or "own: 10 steps"."""
        if self.schedule is None:
            return f"{self.origin}: {self.num_steps} steps"
        return f"{self.origin}: {','.join(map(str, self.schedule.full_steps))}"

    @property
    def label(self) -> str:
        """A name that is unique within one comparison."""
        searched = " (searched steps)" if self.origin == "searched" and self.name != "lesa" else ""
        return f"{self.name}{searched} @{self.full_steps}"


@dataclass(frozen=True)
class Peer:
    """A training-free method: how to make its forecaster, and its family of schedules.

    The rule maps a setting, 1 to the number of steps in fractions of `grid`, to a schedule;
    `published` are the settings that its authors report.
    """

    forecaster: Callable[[], Any]
    rule: Callable[[Any], Schedule]
    published: tuple[float, ...]
    grid: int = 1

    def settings(self, num_steps: int) -> tuple[float, ...]:
        """Every setting that may be tried on a run of this many steps."""
        tried = range(1, self.grid * num_steps + 1)
        return tuple(i if self.grid == 1 else i / self.grid for i in tried)


_TAYLOR = (4, 5, 6, 7, 9)
PEERS: dict[str, Peer] = {
    "fora": Peer(Reuse, Schedule.fora, (3, 5, 7)),
    "taylorseer-0": Peer(lambda: Taylor(order=0), Schedule.taylorseer, _TAYLOR),
    "taylorseer-1": Peer(lambda: Taylor(order=1), Schedule.taylorseer, _TAYLOR),
    "taylorseer-2": Peer(lambda: Taylor(order=2), Schedule.taylorseer, _TAYLOR),
    "hicache": Peer(lambda: HiCache(order=2, sigma=0.5), Schedule.taylorseer, _TAYLOR),
    "spectrum": Peer(Spectrum, Schedule.spectrum, (0.75, 2, 3, 4), grid=4),
}
METHODS: tuple[str, ...] = ("fewer-steps", *PEERS, "lesa")
UNET_ONLY = ("deepcache",)  # on request: "all" means what runs on every pipeline


def parse(names: str | Iterable[str], *, with_lesa: bool = True) -> tuple[str, ...]:
    """Method names from "all" or a comma list; "all" leaves lesa out where it has no forecaster.

    Raises: LesaError for an unknown name, an empty list, or lesa without a forecaster.
    """
    wanted = names.split(",") if isinstance(names, str) else list(names)
    wanted = [name.strip() for name in wanted if name.strip()]
    if wanted == ["all"]:
        return METHODS if with_lesa else METHODS[:-1]
    for name in wanted:
        if name not in METHODS + UNET_ONLY:
            known = ", ".join(METHODS + UNET_ONLY)
            raise LesaError(f"methods: unknown {name!r}; choose all, or from {known}")
    if not wanted:
        raise LesaError(f"methods: none given; choose all, or from {', '.join(METHODS)}")
    if "lesa" in wanted and not with_lesa:
        raise LesaError("methods: 'lesa' needs a trained forecaster; give forecaster=FOLDER")
    return tuple(dict.fromkeys(wanted))


def build(
    name: str,
    full_steps: int,
    num_steps: int,
    *,
    forecaster: Any = None,
    searched: Schedule | None = None,
) -> Method:
    """A method at a wanted number of full steps.

    Without `searched` a peer follows its own published rule, at the setting whose number of full
    steps is nearest to, but not below, the wanted one (the doubt goes to the peer); lesa follows
    the list that its forecaster recommends. `searched` is an explicit list instead.

    Raises: LesaError if the name is unknown, the count impossible, or lesa has no forecaster.
    """
    check_count(full_steps, num_steps)
    if name == "fewer-steps":
        return Method(name, full_steps)
    if name == "lesa":
        if forecaster is None:
            raise LesaError("methods: 'lesa' needs a trained forecaster; give forecaster=FOLDER")
        schedule = searched or forecaster.schedule_for(full_steps, num_steps)
        return Method(name, num_steps, forecaster, schedule.bind(num_steps), "searched")
    if name == "deepcache":
        return _deepcache(full_steps, num_steps)
    if name not in PEERS:
        known = ", ".join(METHODS + UNET_ONLY)
        raise LesaError(f"methods: unknown {name!r}; choose from {known}")
    peer = PEERS[name]
    if searched is not None:
        return Method(name, num_steps, peer.forecaster(), searched.bind(num_steps), "searched")
    return Method(name, num_steps, peer.forecaster(), _nearest(peer, full_steps, num_steps))


def build_all(
    names: Iterable[str],
    counts: Iterable[int],
    num_steps: int,
    *,
    forecaster: Any = None,
    searched: bool = False,
) -> list[Method]:
    """Every method at every wanted number of full steps, each once.

    With `searched` every peer also runs on the list that lesa's forecaster recommends.
    """
    found: dict[str, Method] = {}
    for count in counts:
        for name in names:
            methods = [build(name, count, num_steps, forecaster=forecaster)]
            if searched and forecaster is not None and name in PEERS:
                shared = forecaster.schedule_for(count, num_steps)
                methods.append(build(name, count, num_steps, searched=shared))
            found |= {method.label: method for method in methods}
    return list(found.values())


def _deepcache(wanted: int, num_steps: int) -> Method:
    """DeepCache at the uniform interval with the fewest full steps that are not below `wanted`."""
    from lesa.evaluation.deepcache import deepcache

    counts = {n: -(-num_steps // n) for n in range(1, num_steps + 1)}
    interval = min((n for n in counts if counts[n] >= wanted), key=lambda n: (counts[n], n))
    schedule = Schedule.fora(interval, num_steps)
    cache = partial(deepcache, interval=interval)
    return Method("deepcache", num_steps, None, schedule, own_cache=cache)


def _nearest(peer: Peer, wanted: int, num_steps: int) -> Schedule:
    """The schedule with the fewest full steps that are not below `wanted`.

    Among equal counts a published setting wins (TaylorSeer's 8 of 50 is interval 9, not 8), then
    the smallest, whose gaps are the most even.
    """
    bound = {setting: peer.rule(setting).bind(num_steps) for setting in peer.settings(num_steps)}
    enough = {k: s for k, s in bound.items() if len(s.full_steps) >= wanted}
    if not enough:  # Spectrum's densest setting still skips
        return Schedule.explicit(range(num_steps), num_steps)
    best = min(enough, key=lambda k: (len(enough[k].full_steps), k not in peer.published, k))
    return enough[best]
