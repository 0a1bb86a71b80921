"""The texts of lesa's errors, read from its sources.

Every `LesaError(...)` and `RunError(...)` of lesa/ and kernels/ is found on the syntax tree. What
is filled in when the error is raised stands as ‹name›; where that is itself a text of the sources,
as the reason in a message, its texts are kept beside the message.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from syntax_tree import PLAIN, Function, called, is_prose, is_text, label, makes_text

ROOT = Path(__file__).parents[2]
SOURCES = "lesa", "kernels/lesa_kernels"
ERRORS = {"LesaError", "RunError"}
DEEP = 4  # calls that a text is followed through


@dataclass
class Message:
    """A text that is raised: its file, line, template and the texts that fill its places."""

    file: str
    line: int
    text: str
    fills: dict[str, list[str]] = field(default_factory=dict)

    @property
    def room(self) -> str:
        parts = self.file.split("/")
        return parts[1] if len(parts) > 2 else parts[0]


@dataclass
class Source:
    """A module: its tree, constants, imported names, and the function around each node."""

    file: str
    tree: ast.Module
    constants: dict[str, ast.expr] = field(default_factory=dict)
    imported: dict[str, str] = field(default_factory=dict)
    around: dict[ast.AST, Function | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.constants[node.targets[0].id] = node.value
            if isinstance(node, ast.ImportFrom):
                self.imported |= {
                    name.asname or name.name: node.module or "" for name in node.names
                }
        self._walk(self.tree, None)

    def _walk(self, node: ast.AST, function: Function | None) -> None:
        self.around[node] = function
        inner = node if isinstance(node, Function) else function
        for child in ast.iter_child_nodes(node):
            self._walk(child, inner)


class Sources:
    """All modules, and what is needed to follow a text through them."""

    def __init__(self, root: Path = ROOT) -> None:
        self.modules: dict[str, Source] = {}
        self.calls: dict[str, list[tuple[ast.Call, Source]]] = defaultdict(list)
        self.functions: dict[str, list[tuple[Function, Source]]] = defaultdict(list)
        self._known: dict[tuple[int, str], list[tuple[ast.expr, Source]]] = {}
        for folder in SOURCES:
            for path in sorted((root / folder).rglob("*.py")):
                file = path.relative_to(root).as_posix()
                name = file.removeprefix("kernels/").removesuffix(".py").replace("/", ".")
                source = Source(file, ast.parse(path.read_text(encoding="utf-8")))
                self.modules[name.removesuffix(".__init__")] = source
        for source in self.modules.values():
            for node in ast.walk(source.tree):
                if isinstance(node, ast.Call):
                    self.calls[called(node)].append((node, source))
                elif isinstance(node, Function) and makes_text(node):
                    self.functions[node.name].append((node, source))

    def raised(self) -> Iterator[tuple[ast.Call, Source]]:
        """Every place where an error is made."""
        for name in ERRORS:
            yield from self.calls[name]

    def messages(self) -> list[Message]:
        """One per text and file; an error that repeats another one's has none."""
        found: dict[tuple[str, str], Message] = {}
        for node, source in self.raised():
            for message in self.told(node, source):
                first = found.setdefault((message.file, message.text), message)
                for place, texts in message.fills.items():
                    first.fills[place] = [*dict.fromkeys(first.fills.get(place, []) + texts)]
        return sorted(found.values(), key=lambda message: (message.file, message.line))

    def told(self, node: ast.Call, source: Source) -> Iterator[Message]:
        """The messages of one place."""
        fills: dict[str, list[str]] = {}
        text = self.text(node.args[0], source, fills)
        if re.fullmatch("‹[^›]*›", text):  # the whole sentence is made elsewhere
            for told in dict.fromkeys(fills.get(text, [])):
                yield Message(source.file, node.lineno, told)
        else:
            yield Message(source.file, node.lineno, text, fills)

    def text(
        self, node: ast.expr, source: Source, fills: dict[str, list[str]], deep: int = 0
    ) -> str:
        """An expression as a text with places; the texts that may fill these go to ``fills``."""
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.FormattedValue) else v for v in node.values)
            return "".join(self.text(part, source, fills, deep) for part in parts)
        if isinstance(node, ast.BinOp) and is_text(node):
            return "".join(self.text(n, source, fills, deep) for n in (node.left, node.right))
        if isinstance(node, ast.Name) and (found := self._constant(node.id, source)):
            return self.text(*found, fills, deep)
        place = f"‹{label(node)}›"
        if deep <= DEEP:
            known = [self.text(*end, fills, deep + 1) for end in self._ends(node, source, deep)]
            if told := [text for text in dict.fromkeys(known) if is_prose(text)]:
                fills[place] = [*dict.fromkeys([*fills.get(place, []), *told])]
        return place

    def _constant(self, name: str, source: Source) -> tuple[ast.expr, Source] | None:
        """Where a name is a text of a module, that text."""
        home = self.modules.get(source.imported.get(name, ""), source)
        value = home.constants.get(name)
        return (value, home) if value is not None and is_text(value) else None

    def _ends(self, node: ast.expr, source: Source, deep: int) -> Iterator[tuple[ast.expr, Source]]:
        """The texts that an expression can be, as they are written, and where."""
        more: list[tuple[ast.expr, Source]] = []
        if deep > DEEP:
            return
        if is_text(node):
            yield node, source
        elif isinstance(node, ast.IfExp):
            more = [(node.body, source), (node.orelse, source)]
        elif isinstance(node, ast.BoolOp):
            more = [(way, source) for way in node.values]
        elif isinstance(node, ast.Call) and called(node) not in PLAIN:
            more = self._returned(called(node), source)
        elif isinstance(node, ast.Name):
            if found := self._constant(node.id, source):
                yield found
            elif (function := source.around.get(node)) is not None:
                more = self._bound(node.id, function, source)
        for way in more:
            yield from self._ends(*way, deep + 1)

    def _returned(self, name: str, source: Source) -> list[tuple[ast.expr, Source]]:
        """What the functions of a name return: that of this module or of the imported one, else
        those of all modules."""
        found = self.functions.get(name, [])
        near = (source, self.modules.get(source.imported.get(name, "")))
        nearer = [(function, home) for function, home in found if home in near]
        return [
            (inner.value, home)
            for function, home in nearer or found
            for inner in ast.walk(function)
            if isinstance(inner, ast.Return) and inner.value is not None
        ]

    def _bound(
        self, name: str, function: Function, source: Source
    ) -> list[tuple[ast.expr, Source]]:
        """What a function's variable or parameter is given."""
        key = id(function), name
        if key not in self._known:
            given = self._assigned(name, function, source), self._passed(name, function)
            self._known[key] = [*chain.from_iterable(given)]
        return self._known[key]

    def _assigned(
        self, name: str, function: Function, source: Source
    ) -> Iterator[tuple[ast.expr, Source]]:
        for node in ast.walk(function):
            if isinstance(node, ast.Assign | ast.NamedExpr | ast.AnnAssign) and node.value:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    yield node.value, source
            elif isinstance(node, ast.ExceptHandler) and node.name == name and node.type:
                kinds = {inner.id for inner in ast.walk(node.type) if isinstance(inner, ast.Name)}
                for call, home in chain.from_iterable(map(self.calls.__getitem__, kinds - ERRORS)):
                    if call.args and home is source:
                        yield call.args[0], home

    def _passed(self, name: str, function: Function) -> Iterator[tuple[ast.expr, Source]]:
        arguments = function.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        if name not in (*names, *(a.arg for a in arguments.kwonlyargs)):
            return
        bound = names[1:] if names[:1] in (["self"], ["cls"]) else names
        for call, home in self.calls[function.name]:
            given = dict(zip(bound, call.args, strict=False))
            given |= {word.arg: word.value for word in call.keywords if word.arg}
            if name in given:
                yield given[name], home
