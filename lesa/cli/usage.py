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
_KINDS = {"integer": "a whole number", "int": "a whole number", "float": "a number"}


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
    command = error.ctx.command_path if error.ctx is not None else "lesa"
    parameter, text = getattr(error, "param", None), error.message.strip().rstrip(".")
    if parameter is None:
        text = re.sub(r"^(No such \w+)[: ]*'?([^' ]+)'?", r"\2: \1", error.format_message().strip())
        remedy = "" if re.search("did you mean", text, re.I) else f"; see {command} --help"
        return text[:1] + text[1:].rstrip(".") + remedy
    field = parameter.name.replace("_", "-")
    if type(error).__name__ == "MissingParameter":
        written = parameter.opts[0] if parameter.opts[0].startswith("-") else field.upper()
        return f"{field}=None: it is missing; give {written} (see {command} --help)"
    found = re.search(r"'(.*)' is not a valid (\w+)", text)
    if found:
        wanted = _KINDS.get(found[2].lower(), f"a {found[2].lower()}")
        return f"{field}={found[1]!r}: not {wanted}; give {wanted}"
    return f"{field}: {text}; see {command} --help"
