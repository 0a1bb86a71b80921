"""Files in and out: checked before any work starts, complete or absent afterwards."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lesa.errors import LesaError

_PROMPT_FIELDS = ("prompt", "prompts")
_PROMPT_FILES = (
    "give a UTF-8 text file with one prompt per line, a .csv or .tsv with a column Prompt or"
    " Prompts, or a .json list or .jsonl of texts or of objects with a field prompt"
)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a UTF-8 file, by its ending, as benchmarks publish them.

    .csv and .tsv: the column Prompt or Prompts (DrawBench, PartiPrompts). .json: a list, .jsonl: a
    value per line, of texts or of objects with the field prompt or prompts. Anything else: the
    lines of a text. Names in any case; empty prompts are left out.

    Raises: LesaError if the file is missing, has another form, or holds no prompt.
    """
    path = Path(path)
    readers: dict[str, Callable[[str], list[Any]]] = {
        ".csv": lambda text: _column(csv.DictReader(io.StringIO(text, newline=""))),
        # Tab-separated values have no quotes that mean anything: a prompt may begin with one.
        ".tsv": lambda text: _column(
            csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
        ),
        ".json": lambda text: _listed(json.loads(text)),
        ".jsonl": lambda text: _listed([json.loads(line) for line in text.split("\n") if line]),
    }
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = readers.get(path.suffix.lower(), str.splitlines)(text)
    except FileNotFoundError:
        raise LesaError(
            f"prompts={str(path)!r}: the file does not exist; {_PROMPT_FILES}"
        ) from None
    except (OSError, ValueError, csv.Error) as error:  # not UTF-8, not JSON, another form
        raise LesaError(
            f"prompts={str(path)!r}: cannot read it ({error}); {_PROMPT_FILES}"
        ) from None
    prompts = [prompt.strip() for prompt in found if prompt.strip()]
    if not prompts:
        raise LesaError(f"prompts={str(path)!r}: the file holds no prompt; {_PROMPT_FILES}")
    return prompts


def _column(rows: csv.DictReader[str]) -> list[str]:
    return [_prompt(row) for row in rows]


def _listed(values: Any) -> list[str]:
    if not isinstance(values, list):
        raise ValueError(f"it holds a {type(values).__name__}, not a list")
    return [value if isinstance(value, str) else _prompt(value) for value in values]


def _prompt(record: Any) -> str:
    """The prompt of one row or object; an empty cell at a row's end is empty."""
    if not isinstance(record, dict):
        raise ValueError(f"{record!r} is neither a text nor an object")
    for name, value in record.items():
        if str(name).strip().lower() in _PROMPT_FIELDS and isinstance(value, str | None):
            return value or ""
    raise ValueError(f"no prompt among the fields {', '.join(map(str, record))}")


def require_writable(folder: str | Path, field: str = "out") -> Path:
    """Make `folder` and prove that a file can be written into it.

    Raises: LesaError if it cannot be made, is a file, or refuses a file.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise LesaError(
            f"{field}={str(folder)!r}: cannot write into the folder ({reason}); give another folder"
        ) from None
    return folder


def require_writable_file(path: str | Path, field: str = "json") -> Path:
    """`require_writable` for the folder that a file goes into; a folder in its place is refused."""
    path = Path(path)
    if path.is_dir():
        raise LesaError(f"{field}={str(path)!r}: it is a folder; give a file name")
    require_writable(path.parent, field)
    return path


def write_atomically(path: str | Path, content: bytes | str) -> Path:
    """Write under a temporary name beside `path`, then rename: never half a file at `path`."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)  # mkstemp makes 0600
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def to_json(value: Any) -> str:
    """Strict JSON: a number that is not finite (the PSNR of identical images) becomes null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
