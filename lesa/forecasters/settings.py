"""What a LesaForecaster is made of, checked once."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, get_args

from lesa.core import schema
from lesa.core.checks import MOST_STEPS
from lesa.core.forecaster import Tap
from lesa.errors import LesaError

FORMS = ("continuous", "disca", "paper", "table")
GATES = ("kan", "mlp")
SPLINES = ("ridge", "edge")
_BRANCH = re.compile(r"[A-Za-z_]\w*(#\d+)?")  # a second call without a name is "default#1"
_REMEDY = "correct it, or leave it out for the default"
_MOST = 16  # of stages, branches and layers: a forecaster has one to three of each
# Sizes far beyond use, so that a slip or a damaged file is refused before memory is taken.
FIELDS: dict[str, schema.Description] = {
    "form": schema.choice(*FORMS),
    "history": schema.whole_number(1, 64),
    "uses_latent": schema.maybe(schema.truth),
    "tap": schema.choice(*get_args(Tap)),
    "stages": schema.items(schema.number(0, 1), 0, _MOST),
    "branches": schema.items(schema.text(100), 1, _MOST),
    "hidden": schema.items(schema.whole_number(1, 4096), 0, _MOST),
    "intervals": schema.maybe(schema.whole_number(1, 1024)),
    "num_steps": schema.whole_number(1, MOST_STEPS),
    "windows": schema.maybe(schema.items(schema.whole_number(1, 1024), 0, _MOST + 1)),
    "gate": schema.choice(*GATES),
    "spline": schema.choice(*SPLINES),
    "nodes": schema.whole_number(1, 65_536),
    "seed": schema.whole_number(-(2**63), 2**64 - 1),  # what torch takes
}


@dataclass(frozen=True)
class Settings:
    """The fields of a LesaForecaster; LesaError names the wrong one.

    form: "continuous", "disca", "paper" or "table". history: K cached features (all but paper).
    uses_latent: weigh the current latent too (output tap only; None: wherever it is possible).
    stages: noise levels that part the experts, decreasing. branches: the guidance branches, each
    with parameters of its own. hidden: inner widths of the continuous KAN. intervals: of every
    spline (None: 8 in the continuous form, 5 as in LESA's release in the paper's).
    Paper form only: num_steps it is tied to, windows (steps per stage), gate, spline, nodes
    (ridge nodes, or the two hidden widths of the edge and mlp gates). seed: of the initial values.
    """

    form: str = "continuous"
    history: int = 3
    uses_latent: bool | None = None
    tap: Tap = "output"
    stages: tuple[float, ...] = (0.9, 0.5)
    branches: tuple[str, ...] = ("cond",)
    hidden: tuple[int, ...] = (16,)
    intervals: int | None = None
    num_steps: int = 50
    windows: tuple[int, ...] | None = None
    gate: str = "kan"
    spline: str = "ridge"
    nodes: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in FIELDS}
        schema.checked(given, schema.fields(FIELDS), "", _REMEDY)
        for name in ("stages", "branches", "hidden", "windows"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_stages()
        self._check_latent()
        if not all(map(_BRANCH.fullmatch, self.branches)):
            raise LesaError(
                f"branches={self.branches!r}: not names of guidance branches; give such as 'cond', "
                "'uncond' or 'default#1'"
            )

    def _check_stages(self) -> None:
        bounds = (1.0, *self.stages, 0.0)
        if not all(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
            raise LesaError(
                f"stages={self.stages}: they do not decrease within (0, 1); try (0.9, 0.5)"
            )
        if self.windows is None:
            object.__setattr__(self, "windows", (4, *(8 for _ in self.stages)))
        if len(self.windows or ()) != len(self.stages) + 1:
            raise LesaError(
                f"windows={self.windows}: not a width for each stage; give {len(self.stages) + 1}"
            )

    def _check_latent(self) -> None:
        if self.form == "disca" and self.tap != "output":
            raise LesaError(
                f"tap={self.tap!r} does not go with form='disca', which forecasts what the model "
                "returns; use tap='output'"
            )
        possible = self.tap == "output" and self.form != "paper"
        if self.uses_latent and not possible:
            raise LesaError(
                f"uses_latent=True does not go with tap={self.tap!r}, form={self.form!r}; "
                "the latent is a regressor of the output tap's continuous and table forms only"
            )
        if self.uses_latent is None:
            object.__setattr__(self, "uses_latent", possible)

    def stage_of(self, sigma: float) -> int:
        """The expert for a noise level: 0 above stages[0], the last one at and below stages[-1]."""
        return sum(sigma <= bound for bound in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready; Settings(**fields) gives them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
