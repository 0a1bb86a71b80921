"""How commands talk: text for people, JSON for programs, one sentence for mistakes."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console
from typer.core import TyperCommand

from lesa.cli.checks import check_given
from lesa.cli.launch import leads, refuse_ranks, speaks
from lesa.errors import LesaError, is_out_of_memory
from lesa.util.files import require_writable_file, write_atomically
from lesa.util.strict_json import to_json

Function = TypeVar("Function", bound=Callable[..., Any])
BAD_INPUT, INTERRUPTED = 2, 130
IN_ONE_PROCESS = ("compare", "demo", "play")
STDOUT = Path("-")


class JsonCommand(TyperCommand):
    """A command whose `--json` may stand alone (then "-", standard output) or name a file.

    Where an argument may follow too, only a name that ends in .json is taken for the file.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the missing "-" after a lone `--json`; LesaError for a value that is empty, and for
        an option that is given twice."""
        named = any(arg.partition("=")[0] == "--pipeline" for arg in args)
        positional = any(p.param_type_name == "argument" for p in self.params) and not named
        completed = []
        for at, arg in enumerate(args):
            completed.append(arg)
            following = args[at + 1] if at + 1 < len(args) else "-"
            named = following.endswith(".json") if positional else not following.startswith("-")
            if arg == "--json" and not named and args[at + 1 : at + 2] != ["-"]:
                completed.append("-")
        try:
            if not ctx.resilient_parsing:  # of a shell that completes
                check_given(*self.make_parser(ctx).parse_args(args=[*completed]))
            return super().parse_args(ctx, completed)
        except Exception as error:  # of typer's own copy of click
            for option, name in pairwise(args):
                if option == "--json" and f"({name})" in str(error):
                    raise LesaError(
                        f"json={name!r}: no name of a JSON file; give one that ends in .json"
                    ) from None
            raise


def guarded(command: Function) -> Function:
    """Turn bad input into one line on stderr and exit status 2, Ctrl-C into 130; no traceback."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            if command.__name__ in IN_ONE_PROCESS:
                refuse_ranks(command.__name__)
            places = [path for path in kwargs.values() if isinstance(path, Path)]
            with _warnings_in_words(), no_empty_folders(places):
                return command(*args, **kwargs)
        except LesaError as error:
            if speaks(error):
                complain(str(error))
            raise typer.Exit(BAD_INPUT) from None
        except OSError as error:  # a disk that fills up, a folder that goes away
            complain(f"file={error.filename!r}: {error.strerror or error}; check the disk")
            raise typer.Exit(BAD_INPUT) from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            complain(_too_small(error, kwargs))
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt:
            complain("interrupted; what was finished is kept")
            raise typer.Exit(INTERRUPTED) from None

    return wrapper  # type: ignore[return-value]


@contextmanager
def no_empty_folders(places: Sequence[Path], *, ever: bool = False) -> Iterator[None]:
    """What fails leaves no empty folder that it has made for its results; with `ever` also what
    does not fail."""
    missing = {way for path in places for way in (path, *path.parents) if not os.path.exists(way)}
    try:
        yield
    except BaseException:
        ever = True
        raise
    finally:
        for folder in sorted(missing, key=lambda way: len(way.parts), reverse=True) * ever:
            with suppress(OSError, ValueError):  # not there, a file, or not empty
                folder.rmdir()


@contextmanager
def _warnings_in_words() -> Iterator[None]:
    """A warning is one line, without the file and the line of code that it came from."""
    shown_before = warnings.showwarning

    def show(message: Any, category: Any, *place: Any) -> None:
        if category is UserWarning:
            print(f"warning: {shown(' '.join(str(message).split()))}", file=sys.stderr)
        else:
            shown_before(message, category, *place)

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        if warnings.showwarning is show:
            warnings.showwarning = shown_before


def _too_small(error: BaseException, options: dict[str, Any]) -> str:
    """What to do about a device without enough memory, by those options that the command has and
    that have an effect: frames where they were given."""
    from lesa.cli.inputs import default_device

    known = ["batch_size", "height", "width", *["frames"] * (options.get("frames") is not None)]
    known = [f"--{name.replace('_', '-')}" for name in known if name in options]
    narrow = "dtype" in options and options["dtype"] is None and not _embedded(options)
    remedies = [f"lower {', '.join(known)}"] * bool(known) + ["give --dtype bfloat16"] * narrow
    named = options.get("device") or default_device()
    reason = (str(error).strip() or "out of memory").splitlines()[0][:200].rstrip(" .")
    listed = " or ".join([*remedies, "take a larger device"])
    return f"device={named!r}: it has too little memory ({reason}); {listed}"


def _embedded(options: dict[str, Any]) -> bool:
    """Whether the pipeline is an embedded one, which has one dtype."""
    from lesa.cli.inputs import embedded_name

    name = options.get("pipeline") or options.get("pipeline_option")
    return name is not None and embedded_name(name) is not None


def complain(sentence: str) -> None:
    """One line on stderr."""
    print(f"lesa: {shown(' '.join(sentence.split()))}", file=sys.stderr)


def say(console: Console, text: str) -> None:
    """Print what holds words of users or files: no markup, no escape sequences, no line breaks of
    the console's own."""
    console.print(shown(text), markup=False, soft_wrap=True)


def shown(text: str) -> str:
    """`text` with every character that a terminal would obey, or cannot show, as Python writes it;
    line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def check_json(target: Path | None) -> None:
    """Raises LesaError if a JSON file cannot be written, before any work is done, and for another
    name: a slip would write over what it names."""
    if target is not None and target != STDOUT:
        if target.suffix != ".json" and not os.path.isdir(target):
            raise LesaError(
                f"json={str(target)!r}: no name of a JSON file; give one that ends in .json"
            )
        require_writable_file(target, "json")


def console(target: Path | None) -> Console:
    """Where text for people goes: stderr while standard output carries JSON; of several processes
    the first one speaks."""
    return Console(stderr=target == STDOUT, highlight=False, quiet=not leads())


def emit(target: Path | None, value: Any) -> None:
    """Write `value` as JSON to a file or to standard output; nothing without a target, or where
    another process speaks."""
    if not leads():
        return
    if target == STDOUT:
        sys.stdout.write(to_json(value))
    elif target is not None:
        write_atomically(target, to_json(value))
