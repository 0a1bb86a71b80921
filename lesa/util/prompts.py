"""Prompts from files, in the forms that benchmarks and data sets publish them."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lesa.errors import LesaError

__all__ = ["OWN", "check_text", "own_prompts", "read_other_prompts", "read_prompts"]

OWN = "lesa"  # the name, in place of a file's, of the prompts that come with lesa
MOST_BYTES = 1 << 30  # of a file of prompts

_FIELDS = ("prompt", "prompts", "text", "caption")  # the first of them that a record has
_FILES = (
    "give a UTF-8 text file with one prompt per line, a .csv, .tsv or .parquet with a column"
    " prompt, text or caption, or a .json or .jsonl of texts or of objects with such a field"
)


def read_prompts(path: str | Path, field: str = "prompts") -> list[str]:
    """The prompts of a file, by its ending, as benchmarks and data sets publish them.

    "lesa", "lesa:16" and "lesa:17-48" are no files but lesa's own prompts, see `own_prompts`.
    .csv, .tsv and .parquet: the column prompt, prompts, text or caption, the first of them that is
    there (DrawBench, PartiPrompts). .json: a list, .jsonl: a value per line, of texts or of objects
    with such a field; .json may also be an object whose field annotations, prompts or captions is
    that list (COCO). Anything else: the lines of a UTF-8 text. Names in any case; empty prompts are
    left out. ``field`` is what the file was given as.

    Raises: LesaError if the file is missing, has another form, holds no prompt, or one that is no
        valid Unicode.
    """
    path = Path(path)
    if re.fullmatch(rf"{OWN}(:.*)?", str(path)) and not path.is_file():
        return own_prompts(str(path), field)
    try:
        _check_kind(path, field)
        found = _records(path, field)
    except FileNotFoundError:
        raise LesaError(f"{field}={str(path)!r}: the file does not exist; {_FILES}") from None
    except LesaError:
        raise
    except (OSError, ValueError, csv.Error, RecursionError) as error:  # not UTF-8, not JSON, ...
        told = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise LesaError(
            f"{field}={str(path)!r}: cannot read it ({' '.join(str(told).split())}); {_FILES}"
        ) from None
    prompts = [prompt.strip() for prompt in found if prompt.strip()]
    if not prompts:
        raise LesaError(f"{field}={str(path)!r}: the file holds no prompt; {_FILES}")
    for prompt in prompts:
        check_text(prompt, f"{field}={str(path)!r}: its prompt")
    return prompts


def own_prompts(name: str = OWN, field: str = "prompts") -> list[str]:
    """lesa's own calibration prompts: 100 sentences in twelve languages, written for it.

    "lesa": all; "lesa:16": the first 16, which are varied by themselves; "lesa:17-48": those from
    the 17th to the 48th, to measure on what was not trained on.

    Raises: LesaError for another name, or prompts that are not there.
    """
    file = Path(__file__).with_name("calibration_prompts.txt")
    prompts = file.read_text(encoding="utf-8").splitlines()
    match = re.fullmatch(rf"{OWN}(?::(?:(\d+)-)?(\d+))?", name)
    if match is None:
        raise LesaError(
            f"{field}={name!r}: not a part of lesa's own prompts; give {OWN}, {OWN}:16 or"
            f" {OWN}:17-48"
        )
    first, last = int(match[1] or 1), int(match[2] or len(prompts))
    if not 1 <= first <= last <= len(prompts):
        raise LesaError(
            f"{field}={name!r}: lesa has {len(prompts)} prompts of its own; give {OWN}:1 to"
            f" {OWN}:{len(prompts)}, or a part such as {OWN}:17-48"
        )
    return prompts[first - 1 : last]


def read_other_prompts(
    path: str | Path, field: str, others: Collection[str], what: str
) -> list[str]:
    """The prompts of a file, as `read_prompts` reads them.

    Raises: LesaError too where one of them is among others, of which the message says ``what``
        happens to them as well: "measured too".
    """
    prompts = read_prompts(path, field)
    if shared := set(prompts).intersection(others):
        raise LesaError(
            f"{field}={str(path)!r}: {len(shared)} of its prompts are {what}, e.g."
            f" {min(shared)!r}; remove them from one of the files"
        )
    return prompts


def check_text(text: str, field: str) -> str:
    """`text`; LesaError where it holds half of a character, which no tokenizer takes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        shown = ascii(text if len(text) < 60 else text[:60] + "...")
        raise LesaError(
            f"{field}={shown}: it is no valid Unicode (a lone surrogate); save or type it in UTF-8"
        )
    return text


def _check_kind(path: Path, field: str) -> None:
    """LesaError for what would fill the memory: a device, or a file larger than any of prompts."""
    told = os.stat(path)
    if stat.S_ISCHR(told.st_mode) or stat.S_ISBLK(told.st_mode):
        raise LesaError(f"{field}={str(path)!r}: it is a device; {_FILES}")
    if told.st_size > MOST_BYTES:
        raise LesaError(
            f"{field}={str(path)!r}: its {told.st_size} bytes are more than {MOST_BYTES}; {_FILES}"
        )


def _records(path: Path, field: str) -> list[str]:
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _parquet(path, field)
    readers: dict[str, Callable[[str], list[str]]] = {
        ".csv": lambda text: _column(csv.DictReader(io.StringIO(text, newline=""))),
        # Tab-separated values have no quotes that mean anything: a prompt may begin with one.
        ".tsv": lambda text: _column(
            csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
        ),
        ".json": lambda text: _listed(json.loads(text)),
        ".jsonl": lambda text: _listed(_json_lines(text)),
    }
    return readers.get(kind, str.splitlines)(path.read_text(encoding="utf-8-sig"))


def _parquet(path: Path, field: str) -> list[str]:
    """The column of prompts; of the others nothing is read."""
    path.open("rb").close()  # a missing file is told before a missing package
    try:
        from pyarrow import parquet
    except ImportError:
        raise LesaError(
            f"{field}={str(path)!r}: it needs pyarrow, not installed here; run"
            " `pip install pyarrow` or give another kind of file"
        ) from None
    names = parquet.read_schema(path).names
    name = _field({name: name for name in names})
    values = parquet.read_table(path, columns=[name]).column(0).to_pylist()
    return [_text(value, name) for value in values]


def _json_lines(text: str) -> list[Any]:
    """A value per line; blank lines are left out, and an error names the line."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg} at character {error.colno}") from None
    return found


def _column(rows: csv.DictReader[str]) -> list[str]:
    if rows.fieldnames is not None:
        _field({name: name for name in rows.fieldnames})  # told also where no row follows
    return [_prompt(row) for row in rows]


def _listed(values: Any) -> list[str]:
    if isinstance(values, dict):
        lists = ("annotations", "prompts", "captions")
        inner = next((values[name] for name in lists if isinstance(values.get(name), list)), None)
        if inner is None:
            raise ValueError(
                f"it holds an object with {_names(values)}; looked for a list, or an object with"
                f" a list {' or '.join(lists)}"
            )
        return _listed(inner)
    if not isinstance(values, list):
        raise ValueError(f"it holds a {type(values).__name__}, not a list")
    return [value if isinstance(value, str) else _prompt(value) for value in values]


def _prompt(record: Any) -> str:
    """The prompt of one row or object; an empty cell at a row's end is empty."""
    if not isinstance(record, dict):
        raise ValueError(f"{record!r} is neither a text nor an object")
    name = _field(record)
    return _text(record[name], name)


def _field(record: Mapping[Any, Any]) -> Any:
    """The name that a record has for its prompt."""
    known = {str(name).strip().lower(): name for name in record}
    for wanted in _FIELDS:
        if wanted in known:
            return known[wanted]
    raise ValueError(f"looked for {', '.join(_FIELDS)}, found {_names(record)}")


def _text(value: Any, name: Any) -> str:
    if not isinstance(value, str | None):
        raise ValueError(f"{name} holds a {type(value).__name__}, not a text")
    return value or ""


def _names(record: Mapping[Any, Any]) -> str:
    listed = [repr(str(name)[:40]) for name in record]
    return ", ".join(listed[:12]) + ", ..." * (len(listed) > 12) if listed else "no names"
