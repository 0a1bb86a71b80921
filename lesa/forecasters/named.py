"""A forecaster by what a user types: a folder, a Hub id, or the name of a training-free method."""

from __future__ import annotations

import os
from difflib import get_close_matches

from lesa.core.forecaster import Forecaster
from lesa.errors import LesaError
from lesa.forecasters.lesa import LesaForecaster
from lesa.forecasters.published import METHODS, canonical
from lesa.forecasters.source import is_hub_id

__all__ = ["named"]


def named(source: str | os.PathLike[str], revision: str | None = None) -> Forecaster:
    """The forecaster of this folder, method or Hub repository ("owner/name"), looked for in this
    order; `revision` is the branch, tag or commit of the repository.

    Raises:
        LesaError: there is none of this name, or it cannot be read.
    """
    if isinstance(source, str) and not os.path.isdir(source):
        method = METHODS.get(canonical(source))
        if method is not None:
            if revision is not None:
                raise LesaError(
                    f"revision={revision!r}: {source} is a training-free method, which has none; "
                    "leave it out"
                )
            return method()
        if not is_hub_id(source) and not os.path.exists(source) and os.sep not in source:
            raise _unknown(source)
    try:
        return LesaForecaster.from_pretrained(source, revision=revision)
    except LesaError as error:
        if str(error).startswith(("source=", "revision=")):
            raise
        raise LesaError(f"forecaster={str(source)!r}: {error}") from None


def _unknown(name: str) -> LesaError:
    if "," in name:
        return LesaError(f"forecaster={name!r}: several names; give one")
    near = get_close_matches(name.lower(), METHODS, 1)
    meant = f"did you mean {near[0]!r}? Else give" if near else "give"
    return LesaError(
        f"forecaster={name!r}: neither a folder nor a known method; {meant} the folder or Hub id "
        f"('owner/name') of a trained forecaster, or one of {', '.join(METHODS)}"
    )
