"""The pages of what a guard would gain and of what a stored worth tells, from guard.json and
worth.json."""

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
        yield (
            "What training on 64 prompts finds, kept whatever it gains. *Expected* and *gain* are"
            " dB of the objective over as many pictures taken at random: on the calibration"
            " prompts, each judged by the others, and on the unseen ones. Training keeps a guard"
            " from +0.2 expected on.\n"
        )
        head = ("guard", "expected", "gain", "at risk", "full steps", "off", "on", "everybody")
        yield from table((*head, "better of both"), map(_trained, part["trained"]))
        yield ""


def _trained(row: dict[str, Any]) -> list[str]:
    if "on" not in row:
        return [row["kind"], *(["no limit gains"] + ["-"] * 7)]
    return [
        row["kind"],
        f"{row['expected']:+.2f}",
        f"{row['gain']:+.2f}",
        f"{row['at_risk']}",
        f"{row['mean_full_steps']:.2f}",
        *(_text(row[who]) for who in ("off", "on", "everybody", "oracle")),
    ]


def _line(row: dict[str, Any]) -> list[str]:
    where = PLACES[row["where"]]
    return [f"step {row['decided_at']}", where, *(_text(row[who]) for who in WHO)]


def worth_page(report: dict[str, Any]) -> Iterator[str]:
    """A row per list: what training stored, what four prompts alone say, what came out."""
    away, order = report["away"], [row["pipeline"] for row in report["rows"]]

    def place(row: dict[str, Any]) -> tuple[int, int]:
        return order.index(row["pipeline"]), -len(row["full_steps"])

    yield "# What training says of a list\n"
    yield provenance(report) + " From `worth.json`.\n"
    yield (
        f"PSNR in dB, mean / p10 / minimum, of lists trained on 16 prompts: as the forecaster"
        f" stores it, of the four held-out prompts alone, and of {report['unseen_prompts']} unseen"
        f" prompts. On average the stored mean, p10 and minimum are {away['stored mean']:.1f},"
        f" {away['stored p10']:.1f} and {away['stored minimum']:.1f} dB away from those of the"
        f" unseen prompts, those of the four {away['held mean']:.1f}, {away['held p10']:.1f} and"
        f" {away['held minimum']:.1f} dB.\n"
    )
    yield from table(
        ("pipeline", "full steps", "pictures", "stored", "held out alone", "unseen"),
        (
            [
                row["pipeline"],
                f"{len(row['full_steps'])}",
                f"{row['stored']['pictures']}",
                *(_text(row[who]) for who in ("stored", "held", "unseen")),
            ]
            for row in sorted(report["rows"], key=place)
        ),
    )
    yield ""


def _text(values: dict[str, float]) -> str:
    return " / ".join(f"{values[key]:.1f}" for key in ("mean", "p10", "minimum"))
