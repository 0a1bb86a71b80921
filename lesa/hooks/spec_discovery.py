"""Read the row of an unregistered denoiser from its structure and from the source of its forward.

Leaving the blocks out changes nothing but the tail's first argument if what the blocks make goes
nowhere else. That is checked on the syntax tree; a class in doubt is turned down.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Sequence

from torch import nn

from lesa.errors import LesaError

__all__ = ["Structure", "Unclear", "read_structure"]

CONTAINERS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")
TAILS = ("norm_out", "norm_final", "final_layer")
_STEPS = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.For)

Structure = tuple[tuple[str, ...], str, list[str]]


class Unclear(LesaError):
    """Why a class cannot be understood."""


def read_structure(model: nn.Module) -> Structure:
    """Block containers, tail and argument names of a denoiser's forward.

    Raises:
        Unclear: it has not the usual names, or what its blocks make may pass by the tail.
    """
    lists = {
        name: child for name, child in model.named_children() if isinstance(child, nn.ModuleList)
    }
    blocks = tuple(name for name in CONTAINERS if name in lists)
    tails = [name for name in TAILS if isinstance(getattr(model, name, None), nn.Module)]
    strange = [name for name, child in lists.items() if len(child) > 1 and name not in blocks]
    if sum(len(lists[name]) for name in blocks) < 2:
        raise Unclear(f"no two blocks in any of {', '.join(CONTAINERS)}")
    if len(tails) != 1:
        raise Unclear(f"{len(tails) or 'none'} of {', '.join(TAILS)} where one is expected")
    if strange:
        raise Unclear(f"it has further lists of modules: {', '.join(strange)}")
    _check_flow(_forward(type(model)), blocks, tails[0])
    return blocks, tails[0], list(inspect.signature(type(model).forward).parameters)[1:]


def _forward(cls: type[nn.Module]) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    except (OSError, TypeError, SyntaxError):
        raise Unclear("the source of its forward is not at hand") from None


def _check_flow(forward: ast.AST, blocks: Sequence[str], tail: str) -> None:
    """Unclear unless all that the loops over `blocks` make is the tail's first argument."""
    loops = _loops(forward, blocks)
    steps = sorted(
        (node for node in ast.walk(forward) if isinstance(node, _STEPS)),
        key=lambda node: node.lineno,
    )
    calls = [step for step in steps if _has(step, tail)]
    if len(calls) != 1 or calls[0].lineno <= max(_end(loop) for loop in loops):
        raise Unclear(f"{tail} is not called once, after its blocks")
    call, made = calls[0], set[str]()
    for step in steps:
        inside = any(loop.lineno <= step.lineno <= _end(loop) for loop in loops)
        if step.lineno < call.lineno and (inside or made & _loaded(ast.walk(step))):
            made |= _writes(step)
    feature = _feature(call, tail)
    beside = _loaded(node for node in ast.walk(call) if node not in feature)
    later = _loaded(n for n in ast.walk(forward) if getattr(n, "lineno", 0) > _end(call))
    if made & beside or (made - _writes(call)) & later:
        raise Unclear(f"what its blocks make does not reach its output through {tail} alone")


def _loops(forward: ast.AST, blocks: Sequence[str]) -> list[ast.For]:
    """The loops over the blocks; Unclear where a container is not used in one, or is indexed."""
    loops = [
        node
        for node in ast.walk(forward)
        if isinstance(node, ast.For) and any(_has(node.iter, name) for name in blocks)
    ]
    items = [node.value for node in ast.walk(forward) if isinstance(node, ast.Subscript)]
    for name in blocks:
        if not any(_has(loop.iter, name) for loop in loops) or any(_has(i, name) for i in items):
            raise Unclear(f"its forward does not simply loop over {name}")
    return loops


def _feature(call: ast.stmt, tail: str) -> list[ast.AST]:
    """All nodes of the first argument of the tail in this statement."""
    for node in ast.walk(call):
        if isinstance(node, ast.Call) and _is_self(node.func, tail) and node.args:
            return list(ast.walk(node.args[0]))
    raise Unclear(f"{tail} does not get the feature as its first argument")


def _has(tree: ast.AST, name: str) -> bool:
    return any(_is_self(node, name) for node in ast.walk(tree))


def _is_self(node: ast.AST, name: str) -> bool:
    owner = isinstance(node, ast.Attribute) and node.attr == name and node.value
    return isinstance(owner, ast.Name) and owner.id == "self"


def _end(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _loaded(nodes: Iterable[ast.AST]) -> set[str]:
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def _writes(step: ast.stmt) -> set[str]:
    """Names that a statement binds or changes; `seen.append(x)` changes `seen`."""
    targets: list[ast.AST] = []
    if isinstance(step, ast.Assign):
        targets += step.targets
    elif isinstance(step, (ast.AugAssign, ast.AnnAssign, ast.For)):
        targets.append(step.target)
    elif isinstance(step, ast.Expr) and isinstance(step.value, ast.Call):
        targets.append(step.value.func)
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
