"""Small questions to a syntax tree, as docs/site/raised.py asks them."""

from __future__ import annotations

import ast
import re

PLAIN = {"len", "list", "map", "max", "min", "named_path", "one_line", "repr", "set", "shown"}
PLAIN |= {"sorted", "str", "tuple", "type", "join"}  # of these the argument is told
Function = ast.FunctionDef | ast.AsyncFunctionDef


def makes_text(function: Function) -> bool:
    """Whether a function says that it returns a text."""
    kinds = ast.walk(function.returns) if function.returns else ()
    return any(isinstance(kind, ast.Name) and kind.id == "str" for kind in kinds)


def called(node: ast.Call) -> str:
    """The last name of what is called."""
    target = node.func
    return target.id if isinstance(target, ast.Name) else getattr(target, "attr", "")


def is_text(node: ast.expr) -> bool:
    """Whether it is a text as it is written, or texts in a row."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return is_text(node.left) or is_text(node.right)
    constant = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return constant or isinstance(node, ast.JoinedStr)


def is_prose(text: str) -> bool:
    """Whether a text says something: two words, and no proposal of a similar name."""
    words = re.findall(r"[a-z]{3,}\s|\s[a-z]{3,}", re.sub("‹[^›]*›", "", text))
    return len(words) > 1 and "did you mean" not in text


def label(node: ast.expr) -> str:
    """A short name for what is filled in."""
    if isinstance(node, ast.Name):
        return node.id.strip("_")
    if isinstance(node, ast.Attribute):
        return label(node.value) if node.attr == "__name__" else node.attr.strip("_")
    if isinstance(node, ast.Call):
        inside = next(iter(node.args), None)
        if inside is None or called(node) not in PLAIN:
            return called(node).strip("_").replace("_", " ")
        return f"number of {label(inside)}" if called(node) == "len" else label(inside)
    if isinstance(node, ast.Subscript | ast.Starred):
        return label(node.value)
    if isinstance(node, ast.IfExp):
        ways = (label(way) for way in (node.body, node.orelse))
        return " or ".join(way for way in dict.fromkeys(ways) if way)
    if isinstance(node, ast.GeneratorExp | ast.ListComp | ast.SetComp):
        return label(node.generators[0].iter)
    if isinstance(node, ast.Constant):
        return str(node.value).strip()
    written = ast.unparse(node)
    return written if len(written) < 25 else "value"
