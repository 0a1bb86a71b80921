"""How a method looks in every chart, legible with thirty methods on two lists each.

A colour is a family of methods, a marker one method in it; a dashed line with hollow markers is a
peer that is given lesa's full steps. lesa itself is thick, red and on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from lesa.evaluation.ranking import OURS, Row, is_borrowed

FAMILIES = {  # colour, and how the methods' names begin
    "lesa": ("#c1121f", ()),
    "learned": ("#ee8434", ("lesa-", "l2p", "disca")),
    "fewer steps": ("#6b7280", ("fewer-steps", "euler", "dpm", "unipc")),
    "forecast": ("#2166ac", ("fora", "taylor", "hicache", "spectrum", "freqca", "foca", "tc-pade")),
    "planned": ("#00a5cf", ("dpcache", "meancache", "budcache")),
    "adaptive": (
        "#1b9e77",
        ("teacache", "magcache", "fbcache", "dbcache", "seacache", "speca", "sencache", "dicache"),
    ),
    "block reuse": ("#8a5fbf", ("pab", "fastercache", "deepcache")),
    "token-wise": ("#a6761d", ("toca", "duca", "clusca")),
    "other": ("#111111", ()),
}
EXTRA = "#000000"  # of named series that are not methods
_MARKERS = "os^DvPX<>phd*"


@dataclass(frozen=True)
class Style:
    """How one method is drawn in every chart."""

    family: str
    marker: str

    @property
    def colour(self) -> str:
        return FAMILIES[self.family][0]


def family(method: str) -> str:
    """The family of a method by its name."""
    if method == OURS:
        return OURS
    fitting = (kind for kind, (_, starts) in FAMILIES.items() if method.startswith(starts))
    return next(fitting, "other")


def styles(rows: Sequence[Row]) -> dict[str, Style]:
    """A style for every method, by family in the order of `FAMILIES`."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    methods.sort(key=lambda method: list(FAMILIES).index(family(method)))
    numbers = {kind: count() for kind in FAMILIES}
    return {
        method: Style(family(method), _MARKERS[next(numbers[family(method)]) % len(_MARKERS)])
        for method in methods
    }


def look(row: Row, style: Style) -> dict[str, Any]:
    """Arguments of matplotlib's `plot` for a row's line."""
    mine = row["method"] == OURS
    return {
        "color": style.colour,
        "marker": style.marker,
        "ls": "--" if is_borrowed(row) else "-",
        "mfc": "white" if is_borrowed(row) else style.colour,
        "lw": 2.6 if mine else 0.9,
        "ms": 7 if mine else 4.5,
        "alpha": 1.0 if mine else 0.75,
        "zorder": 5 if mine else 2,
    }


def legend(figure: Any, drawn: Mapping[str, Style], extra: Sequence[str], borrowed: bool) -> None:
    """Beside the panels, by family, so that no line is hidden."""
    from matplotlib.lines import Line2D

    def entry(label: str, **look: Any) -> Line2D:
        return Line2D([], [], label=label, **{"ls": "-", **look})

    entries = [
        entry(method, color=style.colour, marker=style.marker, lw=2.6 if method == OURS else 0.9)
        for method, style in drawn.items()
    ]
    if borrowed:
        grey: dict[str, Any] = {"color": "#555555", "marker": "o"}
        entries.append(entry("on its own list", **grey))
        entries.append(entry("on searched steps", **grey, mfc="white", ls="--"))
    entries += [entry(label, color=EXTRA, ls=":") for label in extra]
    figure.legend(
        handles=entries, loc="upper left", bbox_to_anchor=(0.91, 0.9), fontsize=8.5, frameon=False
    )
