"""The page of what a guard would gain, from guard.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from _result_tables import provenance, table

WHO = ("change", "line", "oracle", "everybody")
PLACES = {"widest": "widest gaps", "nearest": "next gaps"}


def guard_page(report: dict[str, Any]) -> Iterator[str]:
    """A section per pipeline: how the signals rank its pictures, and what more full steps give."""
    yield "# What a guard would gain\n"
    yield provenance(report) + " From `guard.json`.\n"
    yield (
        "A guard would look at an early full step which pictures are at risk, and give those two"
        f" full steps more. PSNR in dB, mean / p10 / minimum of {report['unseen_prompts']} unseen"
        " prompts. The columns give the two steps to the quarter at risk by the change since the"
        " last full step, by the error of a line through the two before, to the quarter that ends"
        " worst (an oracle), and to everybody; skipped steps keep the rows that were fitted without"
        " the two. Spearman's rho is that between a signal and the loss of quality: a perfect"
        " signal has +1.\n"
    )
    for part in report["pipelines"]:
        yield f"## {part['pipeline']}\n"
        steps = ", ".join(map(str, part["full_steps"]))
        yield f"Full steps {steps}: {_text(part['base'])} with no guard.\n"
        head = ("decided at", "two steps more in the", *WHO)
        yield from table(head, map(_line, part["rows"]))
        rho = part["rho"]
        yield ""
        yield from table(
            ("rho at full step", *rho["change"]),
            ([name, *(f"{value:+.2f}" for value in steps.values())] for name, steps in rho.items()),
        )
        yield ""


def _line(row: dict[str, Any]) -> list[str]:
    where = PLACES[row["where"]]
    return [f"step {row['decided_at']}", where, *(_text(row[who]) for who in WHO)]


def _text(values: dict[str, float]) -> str:
    return " / ".join(f"{values[key]:.1f}" for key in ("mean", "p10", "minimum"))
