"""Files in and out: checked before any work starts, complete or absent afterwards."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from lesa.errors import LesaError


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
    # A lone surrogate has no UTF-8: it is written as JSON escapes it.
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)  # mkstemp makes 0600
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def to_json(value: Any) -> str:
    """Strict JSON: a number that is not finite (the PSNR of identical images) becomes null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if any("\ud800" <= character <= "\udfff" for character in text):  # a name that is not UTF-8
        return json.dumps(json.loads(text), indent=2) + "\n"
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
