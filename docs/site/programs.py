"""Pages of programs: a Python file, or a notebook with what its cells printed and drew."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any

PROGRAMS = ".py", ".ipynb"


def page_uri(path: str) -> str:
    """Where the page of a program is."""
    return str(PurePosixPath(path).with_suffix(".md"))


def program_page(path: str, text: str) -> str:
    """Markdown of a program."""
    name = PurePosixPath(path).name
    if name.endswith(".ipynb"):
        return "\n\n".join(_cell(cell) for cell in json.loads(text)["cells"]) + "\n"
    return f"# {name}\n\n{_fenced(text, 'python')}\n"


def _cell(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    parts = [_fenced(source, "python"), *map(_output, cell.get("outputs", []))]
    return "\n\n".join(part for part in parts if part)


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f"![What the cell drew](data:image/png;base64,{picture})"
    text = "".join(output.get("text", data.get("text/plain", "")))
    return _fenced(re.sub(r"\x1b\[[0-9;]*m", "", text), "text") if text.strip() else ""


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
