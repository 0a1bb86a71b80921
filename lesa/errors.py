"""The exceptions that users see."""

from lesa_kernels.errors import LesaError

__all__ = ["LesaError", "RunError", "is_out_of_memory"]

LesaError.__module__ = __name__  # where users know it from


class RunError(LesaError):
    """A generation contradicts what was asked for; raised before its first step."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had too little memory, as torch tells it of each of them."""
    kind, words = type(error).__name__, str(error)
    return kind in ("OutOfMemoryError", "MemoryError") or (
        isinstance(error, RuntimeError)
        and any(known in words for known in ("out of memory", "allocate memory", "enough memory"))
    )
