"""Where a forecaster's files are: a folder, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lesa.errors import LesaError

__all__ = ["is_hub_id", "locate"]


def is_hub_id(source: str | os.PathLike[str]) -> bool:
    """Whether this is not a folder here, but looks like "owner/name"."""
    text = os.fspath(source)  # os.path, since Path.is_dir raises where a name is too long
    return not os.path.isdir(text) and bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(text)))


def locate(
    source: str | os.PathLike[str], names: Sequence[str], revision: str | None
) -> list[Path]:
    """Paths of the named files in a folder, or in a repository, from which they are downloaded.

    Raises: LesaError for what is no source, a folder with a revision, a failed download.
    """
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise LesaError(f"source={source!r}: not a folder or Hub id; give a path or 'owner/name'")
    if revision is not None and not isinstance(revision, str):
        raise LesaError(f"revision={revision!r}: not a text; give a branch, tag or commit")
    if not is_hub_id(source):
        if revision is not None:
            raise LesaError(
                f"revision={revision!r}: {str(source)!r} is not the id of a Hub repository, and "
                "nothing else has revisions; leave it out"
            )
        return [Path(source) / name for name in names]
    from huggingface_hub import hf_hub_download

    try:
        return [Path(hf_hub_download(str(source), name, revision=revision)) for name in names]
    except (OSError, ValueError) as error:  # every hub error is one of the two
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        at = "" if revision is None else f" at revision {revision!r}"
        raise LesaError(
            f"{str(source)!r} is not a folder here and cannot be loaded from the Hub{at} ({told}); "
            "check the name or the network"
        ) from None
