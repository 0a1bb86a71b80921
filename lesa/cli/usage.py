"""Mistakes in the options themselves, which typer finds: one sentence, as for all other ones."""

from __future__ import annotations

import re
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from lesa.cli.output import BAD_INPUT, complain
from lesa.errors import LesaError

_UsageError: Any = typer.BadParameter.__mro__[1]
_ClickException: Any = _UsageError.__mro__[1]
_KINDS = {"integer": "a whole number", "number": "a number", "float": "a number"}


class Commands(TyperGroup):
    """The commands; a usage error is one line on stderr and exit status 2, no box."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run a command; without `standalone_mode` errors are the caller's."""
        if not options.get("standalone_mode", True):
            return super().main(*args, **options)
        try:
            status = super().main(*args, **{**options, "standalone_mode": False})
        except LesaError as error:
            complain(str(error))
            status = BAD_INPUT
        except _ClickException as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
            else:
                complain(sentence(error))
            status = error.exit_code
        sys.exit(status if isinstance(status, int) else 0)


def sentence(error: Any) -> str:
    """A usage error as "field=value: what is wrong; remedy"."""
    help_of = f"`{error.ctx.command_path} --help`" if error.ctx is not None else "`lesa --help`"
    parameter, text = getattr(error, "param", None), _plain(error.message)
    kind = type(error).__name__
    if kind == "NoSuchOption":
        near = [name for name in error.possibilities or () if name.startswith("--")]
        meant = f", did you mean {' or '.join(sorted(near))}" if near else ""
        return f"{error.option_name}: no such option{meant}; {help_of} lists them"
    if parameter is None:
        name = getattr(error, "option_name", None)
        return f"{name}: it needs a value; give one" if name else f"{text}; see {help_of}"
    field = parameter.name.replace("_", "-")
    if kind == "MissingParameter":
        written = parameter.opts[0] if parameter.opts[0].startswith("-") else field.upper()
        return f"{field}=None: it is missing; give {written} (see {help_of})"
    found = _input(error, text)
    wanted = next((words for key, words in _KINDS.items() if key in text), None)
    if found is None or wanted is None:
        value = "" if found is None else f"={found!r}"
        return f"{field}{value}: {text.removeprefix('Value error, ')}; see {help_of}"
    return f"{field}={found!r}: not {wanted}; give one such as 8"


def _plain(text: str) -> str:
    """A message of typer's as the beginning of a sentence."""
    text = " ".join(text.split()).rstrip(".").replace(". Did you mean", ", did you mean")
    return text.rstrip("?")


def _input(error: Any, text: str) -> str | None:
    """The value that was refused: typer's adapters keep it in what they caught, older ones in the
    message."""
    caught = error.__cause__ or error.__context__
    if hasattr(caught, "errors"):
        return str(caught.errors()[0]["input"])
    quoted = re.match(r"'(.*)' is not", text)
    return quoted[1] if quoted else None
