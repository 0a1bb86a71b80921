"""A forecaster on the Hugging Face Hub: weights, config, model card and pictures in one commit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lesa.errors import LesaError
from lesa.forecasters import checkpoint
from lesa.forecasters.card import card
from lesa.util.files import as_path, one_line, read_file

__all__ = ["push"]

CARD, PICTURES = "README.md", "pictures"
_KINDS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8")  # PNG, JPEG, WebP, GIF begin so
MOST_PICTURE = 20 << 20  # bytes


def push(
    forecaster: Any,
    repo_id: str,
    *,
    revision: str | None = None,
    license: str = "other",
    base_model: str | None = None,
    pictures: Sequence[str | os.PathLike[str]] = (),
    private: bool | None = None,
    token: str | bool | None = None,
    message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Make the repository where there is none, and commit to it; the commit's address.

    Args:
        forecaster: a LesaForecaster.
        repo_id: "owner/name".
        revision: the branch, made where there is none; the main one by default.
        license: of the card, an identifier of the Hub such as "mit".
        base_model: of the card: the Hub id of the pipeline, where training did not record one.
        pictures: files for the card.
        private: whether a new repository is; by default as the owner's settings say.
        token: of the Hub; by default that of `hf auth login` or HF_TOKEN.
        message: of the commit.
        create_pr: open a pull request instead of writing to the branch.

    Raises: LesaError, before anything is sent, for what is no repository, no picture or no license,
        and where the Hub refuses or cannot be reached.
    """
    _check_id(repo_id)
    shown = _pictures(pictures)
    text = card(forecaster, repo_id, license=license, base_model=base_model, pictures=list(shown))
    with tempfile.TemporaryDirectory() as made:
        checkpoint.save(forecaster, made)
        stored = {path.name: path.read_bytes() for path in sorted(Path(made).iterdir())}
    content = {**stored, CARD: text.encode(), **shown}
    options = {"revision": revision, "create_pr": create_pr}
    options["commit_message"] = message or "Upload a lesa forecaster"
    return _asked(repo_id, partial(_commit, repo_id, content, private, token, options))


def _commit(
    repo_id: str,
    content: Mapping[str, bytes],
    private: bool | None,
    token: str | bool | None,
    options: Mapping[str, Any],
) -> str:
    """Make the repository and the branch where there are none, and commit; its address."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api, branch = HfApi(token=token), options["revision"]
    api.create_repo(repo_id, private=private, exist_ok=True)
    if branch is not None and not options["create_pr"]:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    files = [CommitOperationAdd(name, data) for name, data in content.items()]
    done = api.create_commit(repo_id, files, **options)
    return str(done.pr_url or done.commit_url)


def _asked(repo_id: str, ask: Callable[[], str]) -> str:
    """What the Hub answers; its refusals and a missing network as one sentence."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with _no_bars():
            return ask()
    except HfHubHTTPError as error:
        status = int(getattr(error.response, "status_code", None) or 0)
        remedy = {
            401: "log in with `hf auth login`, or give a token that may write",
            403: "take a repository of yours, or a token that may write to it",
        }.get(status, "check the name and try again")
        raise LesaError(
            f"repo_id={repo_id!r}: the Hub refused it ({one_line(error, 150)}); {remedy}"
        ) from None
    except Exception as error:  # of whichever client huggingface_hub has
        raise LesaError(
            f"repo_id={repo_id!r}: the Hub cannot be reached ({one_line(error, 150)}); check the "
            "network"
        ) from None


@contextmanager
def _no_bars() -> Iterator[None]:
    """The client's progress bars, which a file of some hundred kilobytes needs none of, are off."""
    from huggingface_hub import utils

    shown = not utils.are_progress_bars_disabled()
    if shown:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bars()


def _check_id(repo_id: Any) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        if not isinstance(repo_id, str) or repo_id.count("/") != 1:
            raise HFValidationError("one slash, between owner and name")
        validate_repo_id(repo_id)
    except HFValidationError:
        raise LesaError(
            f"repo_id={repo_id!r}: not the id of a Hub repository; give owner/name"
        ) from None


def _pictures(given: Sequence[str | os.PathLike[str]]) -> dict[str, bytes]:
    """Their content by where it goes in the repository; LesaError for a file that is no picture, or
    a name that is there twice."""
    if isinstance(given, (str, bytes, os.PathLike)):
        raise LesaError(f"pictures={given!r}: not a list of files; give [{given!r}]")
    found: dict[str, bytes] = {}
    for one in given:
        path = as_path(one, "pictures")
        data = read_file(path, MOST_PICTURE, "give a PNG, JPEG, WebP or GIF")
        if not data.startswith(_KINDS):
            raise LesaError(f"pictures={str(path)!r}: not a picture; give a PNG, JPEG, WebP or GIF")
        name = f"{PICTURES}/{_safe(path.name)}"
        if name in found:
            raise LesaError(f"pictures={str(path)!r}: another one has this name; rename it")
        found[name] = data
    return found


def _safe(name: str) -> str:
    """A file name that needs no quoting in Markdown."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name)
