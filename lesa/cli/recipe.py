"""`--config recipe.yaml`: the options of a command, and how its pipeline is made ready, as a file.

A recipe holds what the command line would: values that are given there win. What no option says is
in `title`, `licence`, `lora`, `scheduler-config`, `memory` and `model`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from lesa.cli.names import did_you_mean
from lesa.cli.options import PIPELINE
from lesa.cli.preparation import Preparation
from lesa.cli.published import Published
from lesa.cli.recipe_values import (
    Kind,
    as_flag,
    as_name,
    as_number,
    as_pairs,
    as_text,
    as_whole,
    checked,
    counts,
    mapping,
)
from lesa.errors import LesaError
from lesa.util.files import read_file
from lesa.util.prompts import OWN

__all__ = ["OPTIONS", "SHARED", "Config", "Recipe", "read_recipe", "recipe_names"]

MOST_BYTES = 1 << 20
SHARED: dict[str, Kind] = {  # options of every command that runs a pipeline
    "pipeline": as_name,
    "negative_prompt": as_text,
    "scheduler": as_name,
    "guidance_scale": as_number,
    "height": as_whole,
    "width": as_whole,
    "frames": as_whole,
    "set": as_pairs,
    "seed": as_whole,
    "batch_size": as_whole,
    "device": as_name,
    "dtype": as_name,
    "attention_backend": as_name,
    "compile": as_flag,
}
OPTIONS: dict[str, Kind] = SHARED | {  # and those of `lesa train` alone
    "prompts": as_name,
    "validation": as_name,
    "out": as_name,
    "full_steps": counts,
    "num_inference_steps": counts,
    "form": as_name,
    "tap": as_name,
    "polish": as_whole,
    "budget": lambda value: as_name(value) if isinstance(value, str) else as_number(value),
    "target_psnr": as_number,
    "guard": lambda value: "off" if value is False else as_name(value),  # which YAML makes of off
}
BESIDE = ("prompts", "validation")  # files that are looked for beside the recipe
FURTHER = ("title", "licence", "lora", "scheduler_config", "memory", "model")


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read.

    Attributes:
        path: the file; Path() for none.
        options: values by the names of options, as the command line would have them.
        title, licence: for people.
        preparation: what is done to the pipeline once it is loaded.
        model: what is known of the model without its weights, if anything.
    """

    path: Path = Path()
    options: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    licence: str = ""
    preparation: Preparation = field(default_factory=Preparation)
    model: Published | None = None

    @property
    def steps(self) -> int | None:
        """The number of steps, where the recipe names one and no more."""
        told = self.options.get("num_inference_steps", "")
        return int(told) if told.isdecimal() else None


def read_recipe(name: str | Path) -> Recipe:
    """The recipe of a file, or of lesa's own by its name, such as flux.1-dev.

    Raises: LesaError for a file that cannot be read, a key that no recipe has or that is there
        twice, and a value of another type.
    """
    path = _find(str(name))
    told = f"config={str(path)!r}"
    values = _parsed(path, told)
    unknown = [key for key in values if key not in OPTIONS and key not in FURTHER]
    if unknown:
        known = [key.replace("_", "-") for key in (*OPTIONS, *FURTHER)]
        shown = unknown[0].replace("_", "-")
        near = did_you_mean(shown, known)
        raise LesaError(f"{told}: {shown} is no key of a recipe{near}; it takes {', '.join(known)}")
    options = {
        key: checked(told, key, value, OPTIONS[key])
        for key, value in values.items()
        if key in OPTIONS
    }
    for key in BESIDE:
        if key in options and not re.fullmatch(rf"{OWN}(:.*)?", options[key]):
            options[key] = str(path.parent / options[key])
    model = mapping(told, "model", values)
    return Recipe(
        path,
        options,
        **{key: checked(told, key, values.get(key, ""), as_text) for key in ("title", "licence")},
        preparation=Preparation.read(told, values),
        model=Published.read(told, model) if model else None,
    )


def recipe_names() -> list[str]:
    """lesa's own recipes by name."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _folder() -> Path:
    """Of an installed package, else of the checkout."""
    package = Path(__file__).parents[1]
    inner = package / "recipes"
    return inner if inner.is_dir() else package.parent / "recipes"


def _find(name: str) -> Path:
    path = Path(name)
    if path.is_file() or name not in recipe_names():
        if not path.exists():
            listed = ", ".join(recipe_names()) or "none"
            near = did_you_mean(name, recipe_names())
            raise LesaError(
                f"config={name!r}: no such file, nor a recipe of lesa{near}; give a .yaml file, or"
                f" one of {listed}"
            )
        return path
    return _folder() / f"{name}.yaml"


def _parsed(path: Path, told: str) -> dict[str, Any]:
    """The mapping in a YAML file, with underscores in its own keys."""
    import yaml

    remedy = "give a YAML file such as those of recipes/"
    data = read_file(path, MOST_BYTES, remedy)
    try:
        found = yaml.load(data, _unique_keys(yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or error
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        reason = " ".join(f"{line}{problem}".split())[:200]
        raise LesaError(f"{told}: no YAML ({reason}); {remedy}") from None
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise LesaError(f"{told}: not a list of keys and values; {remedy}")
    values = {key.replace("-", "_"): value for key, value in found.items() if value is not None}
    names = [key.replace("-", "_") for key in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise LesaError(f"{told}: {twice} is there twice, once with a hyphen; give it once")
    return values


def _unique_keys(loader: Any) -> Any:
    """The loader, but an error for a key that a mapping holds twice, where YAML takes the last."""

    class Unique(loader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1 and isinstance(key, str):
                    raise ValueError(f"the key {key[:60]} is there twice")
            return super().construct_mapping(node, deep)

    return Unique


def _read(name: str) -> Recipe | LesaError:
    """A recipe, or why there is none: typer would put words of its own in the place of an error's,
    so that `_take` raises it."""
    try:
        return read_recipe(name)
    except LesaError as error:
        return error


def _take(context: typer.Context, recipe: Recipe | LesaError | None) -> Recipe | None:
    """Make a recipe's values the defaults of the command's options."""
    if isinstance(recipe, LesaError):
        raise recipe
    if recipe is not None and not context.resilient_parsing:
        names = {parameter.name for parameter in context.command.params}
        taken = OPTIONS if context.command.name == "train" else SHARED
        options = {
            key: value for key, value in recipe.options.items() if key in taken and key in names
        }
        context.default_map = {**(context.default_map or {}), **options}
    return recipe


def _complete(incomplete: str) -> list[str]:
    return [name for name in recipe_names() if name.startswith(incomplete)]


_parser: Callable[[str], Any] = _read
Config = Annotated[
    Recipe | None,
    typer.Option(
        "--config",
        metavar="RECIPE",
        parser=_parser,
        callback=_take,
        is_eager=True,
        show_default=False,
        help="A .yaml file with these options, or one of lesa's own: flux.1-dev, ...",
        rich_help_panel=PIPELINE,
        autocompletion=_complete,
    ),
]
