"""All contenders by name: the peers of `lesa.evaluation.peers`, and lesa itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from lesa.core.schedule import Schedule, check_count
from lesa.errors import LesaError
from lesa.evaluation.method import Bench, Method, Peer
from lesa.evaluation.peers.adaptive import ADAPTIVE
from lesa.evaluation.peers.budcache import ANNEALED
from lesa.evaluation.peers.cache_dit import DBCACHES
from lesa.evaluation.peers.deepcache import UNETS
from lesa.evaluation.peers.dicache import PROBED
from lesa.evaluation.peers.diffusers_caches import CACHES
from lesa.evaluation.peers.disca import DISTILLED
from lesa.evaluation.peers.disca_own import OWN_DISCA
from lesa.evaluation.peers.dpcache import PLANNED
from lesa.evaluation.peers.forecasters import FORECASTERS
from lesa.evaluation.peers.inside_cache_dit import INSIDE
from lesa.evaluation.peers.learned import LEARNED
from lesa.evaluation.peers.meancache import AVERAGED
from lesa.evaluation.peers.sencache import SENSITIVE
from lesa.evaluation.peers.solvers import SOLVERS
from lesa.evaluation.peers.tc_pade import RATIONAL
from lesa.evaluation.peers.tokenwise import TOKENWISE
from lesa.evaluation.peers.untrained import UNTRAINED
from lesa.forecasters.calibration import untrained
from lesa.forecasters.published import canonical

PEERS: dict[str, Peer] = {
    **SOLVERS,
    **FORECASTERS,
    **UNETS,
    **CACHES,
    **DBCACHES,
    **INSIDE,
    **ADAPTIVE,
    **LEARNED,
    **PLANNED,
    **AVERAGED,
    **ANNEALED,
    **SENSITIVE,
    **PROBED,
    **RATIONAL,
    **TOKENWISE,
    **DISTILLED,
    **OWN_DISCA,
    **UNTRAINED,
}
NAMES: tuple[str, ...] = (*PEERS, "lesa")
# Those whose `unfit` looks at the classes of a pipeline and its denoiser alone.
BY_CLASS: tuple[str, ...] = (
    *UNETS,
    *ADAPTIVE,
    *ANNEALED,
    *SENSITIVE,
    *PROBED,
    *RATIONAL,
    *TOKENWISE,
    *DISTILLED,
    *OWN_DISCA,
)


def parse(names: str | Iterable[str], bench: Bench) -> tuple[str, ...]:
    """Canonical names from "all" or a comma list; "all" means those that can run on the bench.

    Raises: LesaError for an unknown name, an empty list, or one that cannot run here.
    """
    wanted = names.split(",") if isinstance(names, str) else list(names)
    wanted = [canonical(name.strip()) for name in wanted if name.strip()]
    if wanted == ["all"]:
        missing = left_out(NAMES, bench)
        return tuple(name for name in NAMES if name not in missing)
    if "all" in wanted:
        raise LesaError(f"methods={names!r}: all stands alone; give all, or names without it")
    for name in wanted:
        if name not in NAMES:
            raise LesaError(f"methods={name!r}: unknown; choose all, or from {', '.join(NAMES)}")
        if (reason := unfit(name, bench)) is not None:
            raise LesaError(f"methods={name!r}: it {reason}")
    if not wanted:
        raise LesaError(f"methods={names!r}: none given; choose all, or from {', '.join(NAMES)}")
    return tuple(dict.fromkeys(wanted))


def unfit(name: str, bench: Bench) -> str | None:
    """Why a method cannot run on this bench, with the remedy, or None."""
    if name == "lesa":
        missing = "needs a trained forecaster; give forecaster=FOLDER"
        return missing if bench.forecaster is None else None
    return PEERS[name].unfit(bench)


def left_out(names: Iterable[str], bench: Bench) -> dict[str, str]:
    """Those of the names that cannot run on the bench, each with a sentence that says why."""
    reasons = {name: unfit(name, bench) for name in names}
    return {name: f"{name} is left out: it {why}" for name, why in reasons.items() if why}


def build(name: str, full_steps: int, bench: Bench, *, searched: Schedule | None = None) -> Method:
    """A method at a wanted number of full steps.

    Without `searched` a peer follows its own published rule, at the setting whose number of full
    steps is nearest to, but not below, the wanted one (ties favour the peer); lesa follows
    the list that its forecaster recommends. `searched` is an explicit list instead.

    Raises: LesaError if the name is unknown, the count impossible, or it cannot run here.
    """
    check_count(full_steps, bench.num_steps)
    (name,) = parse([name], bench)
    if name != "lesa":
        return PEERS[name].build(name, full_steps, bench, searched)
    schedule = searched or bench.forecaster.schedule_for(full_steps, bench.num_steps)
    schedule = schedule.bind(bench.num_steps)
    calibrations = getattr(bench.forecaster, "calibrations", ())
    made = None if searched else untrained(calibrations, full_steps)
    notes = [f"not trained: {made}"] if made else []
    guards = {c.guard.kind for c in calibrations if c.guard and c.schedule == schedule}
    notes += [f"guard: {kind}" for kind in sorted(guards)]
    return Method(
        name,
        bench.num_steps,
        bench.forecaster,
        schedule,
        "searched",
        one_by_one=bool(guards),
        note="; ".join(notes),
    )


def build_all(
    names: Iterable[str], counts: Iterable[int], bench: Bench, *, searched: bool = False
) -> list[Method]:
    """Every method at every wanted number of full steps, each once.

    With `searched` every peer that can also runs on the list that lesa's forecaster recommends.
    """
    found: dict[str, Method] = {}
    names, counts = tuple(map(canonical, names)), tuple(counts)
    more = [] if bench.forecaster is None else _spent(bench.forecaster, counts, bench.num_steps)
    for count, name in product((*counts, *more), names):
        if name == "lesa" and count in more:
            continue
        methods = [build(name, count, bench)]
        if searched and bench.forecaster is not None and name != "lesa" and PEERS[name].takes_lists:
            shared = bench.forecaster.schedule_for(count, bench.num_steps)
            methods.append(build(name, count, bench, searched=shared))
        found |= {method.label: method for method in methods}
    return list(found.values())


def _spent(forecaster: Any, counts: Sequence[int], num_steps: int) -> list[int]:
    """Numbers of full steps between what was wanted and the most that a guard makes of it, which
    peers get too, so that they can be compared at an equal mean."""
    found: set[int] = set()
    for entry in getattr(forecaster, "calibrations", ()):
        count, guard = len(entry.schedule.full_steps), entry.guard
        if guard is not None and count in counts and entry.schedule.steps == num_steps:
            found |= {*range(count + 1, count + 1 + len(guard.extra_steps(entry.schedule)))}
    return sorted(found - {*counts}, reverse=True)
