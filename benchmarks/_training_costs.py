"""The table of docs/training.md: what the trainings behind the comparisons took."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from _result_tables import table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "training.md"
BEGIN, END = "<!-- begin of the table -->\n", "<!-- end of the table -->"
HEAD = ("pipeline", "full steps", "prompts", "plain generations per prompt", "seconds")


def training_page(compared: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with its table written anew; ``compared`` has the file of each pipeline."""
    lines = "".join(f"{line}\n" for line in table(HEAD, _lines(compared)))
    page = PAGE.read_text(encoding="utf-8")
    return re.sub(f"(?s)(?<={BEGIN}).*?(?={END})", lambda _: lines, page, count=1)


def _lines(compared: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    for name, part in compared.items():
        training, steps = part["training"], part["settings"]["num_inference_steps"]
        log = "\n".join(training["log"])
        [cost] = re.findall(r"cost: ([\d.]+) plain generations per prompt", log)
        counts = re.findall(rf"fitted: (\d+) of {steps} steps in full", log)
        yield [
            f"[{name}](results/{name}.md)",
            f"{', '.join(counts)} of {steps}",
            str(training["prompts"]),
            cost,
            f"{training['seconds']:.0f}",
        ]
