"""Methods that failed on the way: the others go on without them, and each is told of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from lesa.errors import LesaError

__all__ = ["Failures"]

Made = TypeVar("Made")


@dataclass
class Failures:
    """Why methods are left out of a comparison, by label."""

    reasons: dict[str, str] = field(default_factory=dict)

    def attempt(self, label: str, where: str, act: Callable[[], Made]) -> Made | None:
        """What `act` gives; where it fails, None, and the reason is kept. An interrupt passes."""
        try:
            return act()
        except Exception as error:
            lines = str(error).strip().splitlines() or ["it says nothing"]
            kind = "" if isinstance(error, LesaError) else f"{type(error).__name__}: "
            self.reasons[label] = f"failed {where}: {kind}{lines[0]}"
            return None

    def notes(self) -> list[str]:
        """A sentence for every reason, with all labels that share it."""
        labels: dict[str, list[str]] = {}
        for label, why in self.reasons.items():
            labels.setdefault(why, []).append(label)
        return [f"left out: {', '.join(shared)} {why}" for why, shared in labels.items()]

    def nothing_left(self) -> LesaError:
        """The error of a comparison all of whose methods failed."""
        told = "; ".join(note.removeprefix("left out: ") for note in self.notes())
        return LesaError(
            f"methods={[*self.reasons]}: none of them could be measured ({told}); choose others"
        )
