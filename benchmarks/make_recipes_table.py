"""What each recipe of recipes/ takes, from its plan: `python benchmarks/make_recipes_table.py`.

Writes the table of docs/recipes.md and the line `# cost:` of every recipe. Nothing is downloaded:
the plans are those of `lesa train --config NAME --dry-run`. `--only flux.1-dev` plans some again
and keeps the other rows.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from lesa.cli.plan import gigabytes
from lesa.cli.recipe import read_recipe, recipe_names
from lesa.cli.requests import TrainRequest
from lesa.cli.run_train import run_train

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "recipes.md"
BEGIN, END = "<!-- begin of the table -->\n", "<!-- end of the table -->"
HEAD = (
    "| recipe | denoiser | steps | full steps | prompts | plain generations, at most | PFLOP"
    " | weights: denoiser, others | a picture that is trained | plain runs on the host |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
)


def planned(name: str) -> tuple[str, str]:
    """The row of a recipe, and what its plan says of the cost."""
    recipe, told = read_recipe(name), io.StringIO()
    request = TrainRequest(config=recipe, dry_run=True, **_typed(recipe.options))
    plan = run_train(request, Console(file=told, width=500))
    (cost,) = re.findall(r"(?m)^cost +(.+?)\s*$", told.getvalue())
    return _row(name, plan), cost


def _typed(options: dict[str, Any]) -> dict[str, Any]:
    """Paths as the command line makes them."""
    paths = ("prompts", "validation", "out")
    return {key: Path(value) if key in paths else value for key, value in options.items()}


def _row(name: str, plan: dict[str, Any]) -> str:
    memory, cost = plan["memory"], plan["cost"]
    weights = " + ".join(gigabytes(size) for size in memory["denoisers"])
    offload = plan["preparation"].get("offload")
    turns = f" (in turn: {offload} offload)" if offload else ""
    rows = f"{plan['branches']} row{'s' * (plan['branches'] > 1)} a step"
    cells = [
        f"[{name}](../recipes/{name}.yaml)",
        f"{plan['parameters'] / 1e9:.2f} B, {rows}",
        f"{plan['num_inference_steps'][0]}",
        ", ".join(map(str, plan["full_steps"])),
        f"{plan['prompts']}",
        f"{cost['generations']:.0f}",
        "-" if cost["flops"] is None else f"{cost['flops'] / 1e15:.4g}",
        f"{weights}, {gigabytes(memory['others'])}{turns}",
        gigabytes(memory["picture"]),
        gigabytes(memory["plain_run"]),
    ]
    return f"| {' | '.join(cells)} |\n"


def kept() -> dict[str, str]:
    """The rows that the page has, by recipe."""
    table = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    return {match[1]: match[0] for match in re.finditer(r"(?m)^\| \[(\S+?)\]\(.*\n", table)}


def write(rows: dict[str, str]) -> None:
    """Put the rows into the page, in the order of the recipes."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    listed = "".join(rows[name] for name in recipe_names() if name in rows)
    PAGE.write_text(f"{before}{BEGIN}{HEAD}{listed}{END}{after}", encoding="utf-8")


def main() -> None:
    """Plan the recipes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=recipe_names(), default=recipe_names())
    rows = kept()
    for name in parser.parse_args().only:
        rows[name], cost = planned(name)
        file = ROOT / "recipes" / f"{name}.yaml"
        text = re.sub(r"(?m)^# cost: .*$", f"# cost: {cost}", file.read_text(encoding="utf-8"))
        file.write_text(text, encoding="utf-8")
        write(rows)
        print(name, cost, flush=True)


if __name__ == "__main__":
    main()
