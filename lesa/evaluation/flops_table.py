"""The counted operations of a published model as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from lesa.evaluation.report import readable_bytes


def flops_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """`flops_rows` for a terminal."""
    first = rows[0]
    tokens = " + ".join(f"{count}" for count in first["tokens"])
    branches = f", {first['branches']} guidance branches" if first["branches"] > 1 else ""
    work = f"{first['num_steps']} steps of {_readable(first['tflops_full_step'])}FLOP"
    title = f"{first['model']}: {tokens} tokens, {work}{branches}"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    table.add_column("tap", no_wrap=True)
    columns = ("full steps", "skipped step", "TFLOPs", "speed-up", "cache", "paper", "off by")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        skipped = row["tflops_skipped_step"]
        table.add_row(
            row["tap"] or "plain",
            f"{row['full_steps']}",
            "-" if skipped is None else _readable(skipped),
            f"{row['tflops']:.2f}",
            f"{row['speedup']:.2f}x",
            readable_bytes(row["cache_bytes"]) if row["tap"] else "-",
            "-" if row["paper_tflops"] is None else f"{row['paper_tflops']:.2f}",
            _deviations(row),
        )
    return table


def _readable(tflops: float) -> str:
    """0.0018 -> "1.8 G"."""
    for unit in ("T", "G"):
        if tflops >= 1:
            return f"{tflops:.4g} {unit}"
        tflops *= 1000
    return f"{tflops:.4g} M"


def _deviations(row: Mapping[str, Any]) -> str:
    if row["deviation"] is None:
        return "-"
    adapter = row.get("deviation_adapter")
    return f"{row['deviation']:+.1%}" + (f" ({adapter:+.1%})" if adapter is not None else "")
