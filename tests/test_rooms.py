"""Who may import whom in lesa/, read from the syntax tree: rooms, and no circles of modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FREE = {"errors", "_version"}
ALL = {
    "lesa",
    "core",
    "util",
    "ops",
    "forecasters",
    "hooks",
    "engine",
    "training",
    "testbed",
    "api",
}
ALLOWED = {
    "core": set(),
    "util": set(),
    "ops": set(),
    "forecasters": {"core", "util"},
    "hooks": {"core", "util"},
    "engine": {"core", "util", "ops", "hooks", "forecasters"},
    "training": {"core", "util", "hooks", "forecasters"},
    "testbed": {"hooks"},
    "exchange": {"core", "util", "forecasters"},
    "api": {"core", "util", "hooks", "engine", "forecasters", "ops"},
    "integrations": {"lesa", "core", "hooks", "engine", "forecasters", "api"},
}
ALLOWED["evaluation"] = {"lesa", *ALLOWED}
ALLOWED["play"] = {"lesa", "core", "util", "hooks", "forecasters"}
ALLOWED["cli"] = {"lesa", *ALLOWED}
TOP = {"__init__", "__main__", "_version", "api", "errors"}


def modules(package: str, folder: Path) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    found = {}
    for path in folder.rglob("*.py"):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, also inside functions and for types alone."""
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in LESA else node.module
        else:
            pending += ast.iter_child_nodes(node)


LESA = modules("lesa", ROOT / "lesa")


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "lesa"


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_a_room_imports_what_it_may(name):
    wrong = {
        (module, other)
        for module, path in LESA.items()
        if room(module) == name
        for other in imported(path)
        if other in LESA and room(other) not in {name, *FREE, *ALLOWED[name]}
    }
    assert not wrong


def test_no_module_is_imported_in_a_circle():
    """Not even inside a function or for types alone."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for module, path in LESA.items():
        for other in imported(path):
            if other in LESA and other != module:
                sorter.add(module, other)
    sorter.prepare()  # CycleError names the circle


def test_kernels_import_nothing_of_lesa():
    kernels = modules("lesa_kernels", ROOT / "kernels" / "lesa_kernels")
    assert not [(m, o) for m, p in kernels.items() for o in imported(p) if o in ("lesa", *LESA)]


def test_the_top_floor_is_small():
    assert {path.stem for path in (ROOT / "lesa").glob("*.py")} == TOP


def test_messages_are_written_alike():
    """A user's mistake is told as "field=value: what is wrong; remedy", with no full stop."""
    wrong = []
    for path in [*(ROOT / "lesa").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and getattr(node.func, "id", "")
            if called in ("LesaError", "RunError", "RankError") and node.args:
                text = ast.unparse(node.args[0]).rstrip("'\"")
                if text.endswith(".") and not text.endswith("..."):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong
