"""Where a forecaster's files are: a folder, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lesa.errors import LesaError

__all__ = ["from_hub", "is_hub_id", "locate"]


def is_hub_id(source: str | os.PathLike[str]) -> bool:
    """Whether this is nothing that is here, but looks like "owner/name"."""
    text = os.fspath(source)  # os.path, since Path.exists raises where a name is too long
    return not os.path.exists(text) and bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(text)))


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
        if os.path.isfile(source):
            raise LesaError(f"{str(source)!r} is a file; give the folder that it is in")
        return [Path(source) / name for name in names]
    try:
        return [from_hub(str(source), name, revision) for name in names]
    except (OSError, ValueError) as error:  # every hub error is one of the two
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        at = "" if revision is None else f" at revision {revision!r}"
        raise LesaError(
            f"{str(source)!r} is not a folder here and cannot be loaded from the Hub{at} ({told}); "
            "check the name or the network"
        ) from None


def from_hub(repo: str, name: str, revision: str | None = None) -> Path:
    """A file of a repository; where the Hub cannot be reached, as it was last downloaded.

    Whether it can is asked once: huggingface_hub itself would try for half a minute.

    Raises: an OSError or a ValueError where there is none, an EntryNotFoundError where only this
        file is missing.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        url = hf_hub_url(repo, name, revision=revision)
        get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HfHubHTTPError, ValueError):  # an answer, or a name that is told below
        pass
    except Exception as error:  # of whichever client huggingface_hub has
        try:
            return Path(hf_hub_download(repo, name, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise ConnectionError(f"no connection: {error}") from None
    return Path(hf_hub_download(repo, name, revision=revision))
