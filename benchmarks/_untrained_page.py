"""The page of lesa without training, from untrained.json and prior.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from _result_tables import WRITTEN, provenance, table

MORE = 1.15  # times the full steps that a peer may have, as in the other pages
OURS, LEFT_OUT, MAIN = "lesa-untrained", "left out", "50 steps"
HEAD = ("pipeline", "full steps", OURS, "its shape from the others", "best peer", "better by")


def untrained_page(report: dict[str, Any], fit: dict[str, Any]) -> Iterator[str]:
    """Each count on each pipeline, then the other places; mean / p10 / minimum in dB."""
    yield "# lesa without training\n"
    yield provenance(report) + " From `untrained.json` and `prior.json`.\n"
    numbers = ", ".join(f"{name} {value:g}" for name, value in fit["shape"].items())
    yield (
        f"What `lesa.enable(pipe)` does, with these numbers: {numbers}. They were chosen on"
        " training prompts of the four pipelines; in the fourth column on those of the three"
        " others, as for a model that nobody has seen. Up to"
        f" {report['unseen_prompts']} unseen prompts, in other places half as many. PSNR in dB:"
        " mean / p10 / minimum. Of the peers the best one counts, anew for each of the three, on"
        " its own list with no fewer full steps and at most 15 % more.\n"
    )
    places = report["places"]
    yield from table(HEAD, (_line(place) for place in places if place["place"] == MAIN))
    yield "\n## In other places\n"
    head = ("pipeline", "place", *HEAD[1:3], *HEAD[4:])
    others = (place for place in places if place["place"] != MAIN)
    yield from table(head, (_line(place, elsewhere=True) for place in others))
    yield ""


def _line(place: dict[str, Any], elsewhere: bool = False) -> list[str]:
    rows = {row["method"]: row for row in place["rows"]}
    ours = values(rows[OURS])
    peers = {
        name: values(row)
        for name, row in rows.items()
        if name not in (OURS, LEFT_OUT) and len(row["full_steps"]) <= MORE * place["count"]
    }
    best = [max(found[i] for found in peers.values()) for i in range(3)]
    leader = max(peers, key=lambda name: peers[name][0])
    judged = ours if elsewhere else values(rows.get(LEFT_OUT, rows[OURS]))
    return [
        place["pipeline"],
        *([place["place"]] if elsewhere else []),
        str(place["count"]),
        _text(ours),
        *([] if elsewhere else [_text(judged)]),
        f"{_text(best)} ({_named(leader)} in the mean)",
        " / ".join(f"{a - b:+.1f}" for a, b in zip(judged, best, strict=True)),
    ]


def values(row: dict[str, Any]) -> list[float]:
    """Mean, 10th percentile and minimum of a row's pictures."""
    found = np.array(row["psnr"])
    return [float(found.mean()), float(np.quantile(found, 0.1)), float(found.min())]


def _text(found: Sequence[float]) -> str:
    return " / ".join(f"{value:.1f}" for value in found)


def _named(method: str) -> str:
    kind, _, rest = method.partition("-")
    return f"{WRITTEN[kind]} {rest}".strip()
