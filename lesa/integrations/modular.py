"""lesa in diffusers' modular pipelines, whose guiders call the denoiser once for each prediction.

`lesa.enable(pipe)` works there as it does elsewhere. Most of their loops do not tell the denoiser
which prediction a call is for, so that rows trained for "cond" and "uncond" are not found: their
guider knows, and `name_branches(pipe)` lets it tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lesa.errors import LesaError
from lesa.hooks.pipeline import find_denoiser

__all__ = ["name_branches"]

_PREPARES = ("prepare_inputs", "prepare_inputs_from_block_state")
_METHODS = (*_PREPARES, "prepare_models", "cleanup_models")


@contextmanager
def name_branches(pipe: Any) -> Iterator[Any]:
    """While it lasts, each call that the pipeline's guider asks for has the name of its prediction:
    "cond" for pred_cond, "uncond" for pred_uncond.

    Args:
        pipe: a modular pipeline with a guider, whose denoiser is accelerated.

    Raises:
        LesaError: it has no guider, or its denoiser takes no names: it is not accelerated.
    """
    guider, model = getattr(pipe, "guider", None), find_denoiser(pipe)
    if guider is None or not all(hasattr(guider, name) for name in _METHODS):
        raise LesaError(
            f"pipe: a {type(pipe).__name__} without a guider; call it as it is, its guidance needs "
            "no names"
        )
    if not hasattr(model, "cache_context"):
        raise LesaError(f"pipe: its {type(model).__name__} is not accelerated; call lesa.enable")
    calls = _Calls(model, guider)
    for name in _METHODS:
        setattr(guider, name, calls.around(name, getattr(guider, name)))
    try:
        yield pipe
    finally:
        calls.leave()
        for name in _METHODS:
            delattr(guider, name)


class _Calls:
    """The predictions that a guider has asked for at this step, in the order of their calls."""

    def __init__(self, model: Any, guider: Any) -> None:
        self._model, self._key = model, guider._identifier_key
        self._names: list[str] = []
        self._inside: AbstractContextManager[Any] | None = None

    def around(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The guider's method, which also notes the names, begins or ends a named call."""

        def called(*args: Any, **kwargs: Any) -> Any:
            if name == "prepare_models":
                self._enter()
            elif name == "cleanup_models":
                self.leave()
            found = method(*args, **kwargs)
            if name in _PREPARES:
                self._names = [getattr(batch, self._key) for batch in found]
            return found

        return called

    def _enter(self) -> None:
        self.leave()
        if self._names:
            inside = self._model.cache_context(self._names.pop(0).removeprefix("pred_"))
            inside.__enter__()
            self._inside = inside

    def leave(self) -> None:
        """End the named call; one that broke off ends here."""
        inside, self._inside = self._inside, None
        if inside is not None:
            inside.__exit__(None, None, None)
