"""Files in and out: checked before any work starts, complete or absent afterwards."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from pathlib import Path
from typing import Any

from lesa.errors import LesaError

__all__ = [
    "as_path",
    "named_path",
    "one_line",
    "read_file",
    "require_new_file",
    "require_writable",
    "require_writable_file",
    "write_atomically",
]


def as_path(value: Any, field: str) -> Path:
    """A path as the user gave it; LesaError for what is none, an empty text included."""
    given = isinstance(value, (str, os.PathLike)) and isinstance(os.fspath(value), str)
    if not given or not str(value).strip() or "\0" in str(value):
        raise LesaError(f"{field}={value!r}: not a path; give the name of a file or folder")
    return Path(value)


def named_path(path: str | os.PathLike[str]) -> str:
    """A path as text for a sentence: quoted where it has characters that a terminal obeys."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def one_line(error: BaseException, longest: int = 200) -> str:
    """What an error says, for a sentence: no line breaks, no characters that a terminal obeys."""
    words = " ".join(str(error).split())[:longest]
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


def read_file(path: str | os.PathLike[str], most: int, remedy: str) -> bytes:
    """A regular file of at most `most` bytes.

    Raises: LesaError, before anything is waited for or much memory taken, for a folder, a pipe, a
        device, a larger file, and what the system does not read.
    """
    path = Path(path)
    try:
        # Opening a pipe without a writer waits unless told not to; Windows has no such flag.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise LesaError(f"{named_path(path)} is not a regular file; {remedy}")
            if found.st_size > most:
                raise LesaError(
                    f"{named_path(path)} has {found.st_size} bytes, more than {most}; {remedy}"
                )
            return file.read(most)
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        if isinstance(error, LesaError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise LesaError(f"{named_path(path)} cannot be read ({reason}); {remedy}") from None


def require_writable(folder: str | os.PathLike[str], field: str = "out") -> Path:
    """Make `folder` and prove that a file can be written into it.

    Raises: LesaError if it is no path, cannot be made, is a file, or refuses a file.
    """
    folder = as_path(folder, field)
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


def require_writable_file(path: str | os.PathLike[str], field: str = "json") -> Path:
    """`require_writable` for the folder that a file goes into; what is in its place already and is
    no regular file is refused."""
    path = as_path(path, field)
    if os.path.isdir(path):
        raise LesaError(f"{field}={str(path)!r}: it is a folder; give a file name")
    if os.path.exists(path) and not os.path.isfile(path):
        raise LesaError(f"{field}={str(path)!r}: it is a pipe or a device; give a file name")
    require_writable(path.parent, field)
    return path


def require_new_file(path: str | os.PathLike[str], field: str) -> Path:
    """`require_writable_file`, and LesaError for what is there already."""
    path = require_writable_file(path, field)
    if os.path.lexists(path):
        raise LesaError(f"{field}={str(path)!r}: it is there already; give another name")
    return path


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write under a temporary name beside `path`, then rename: never half a file at `path`.

    A new file gets the permissions that the user's mask leaves, one that is replaced keeps its own.
    It is on the disk before it has its name. Raises LesaError where the system refuses: a full or
    read-only disk, a folder that went away or is none, something other than a file at `path`.
    """
    path = Path(path)
    # A lone surrogate has no UTF-8: it is written as JSON escapes it.
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    temporary = path.parent / f".lesa-{secrets.token_hex(8)}.part"
    try:
        mode = _mode(path)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(handle)
            if mode is not None:
                os.chmod(temporary, mode)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LesaError(
            f"file={str(path)!r}: cannot be written ({reason}); make room or give another place"
        ) from None
    return path


_BINARY = getattr(os, "O_BINARY", 0)  # of Windows


def _mode(path: Path) -> int | None:
    """The permissions of a file that will be replaced, None of a new one."""
    try:
        found = os.stat(path).st_mode
    except OSError:
        return None
    if not stat.S_ISREG(found):
        raise OSError(None, "not a regular file")
    return stat.S_IMODE(found)
