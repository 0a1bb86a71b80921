"""The table of mixing coefficients that an engine runs: one row per skipped step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lesa.core.checks import shown, whole
from lesa.core.schedule import Schedule
from lesa.errors import LesaError

if TYPE_CHECKING:
    from lesa_kernels.gate import Gate

Row = Callable[[int, tuple[int, ...]], Sequence[float]]


@dataclass(frozen=True, eq=False)
class GatedRows:
    """The rows of a table as the paper writes them, for a kernel that evaluates the gate itself:

        h_hat_s = ring[0] + gate(tau[s]) * (sum_k weights[s, k] * ring[k] + bias[s])

    with the gate of expert experts[s]. `weights` [S, K] and `bias` [S] are float64, `tau` is
    [S, T], `experts` [S] integers. Within rounding it is what the table's own coefficients say.
    Source: LESA (arXiv 2602.20497), eqs. 4-7.
    """

    weights: Tensor
    bias: Tensor
    tau: Tensor
    experts: Tensor
    gate: Gate


@dataclass(frozen=True, eq=False)
class Table:
    """h_hat_s = sum_k coefficients[s, k] * ring[k] (+ c_latent * x_s) (+ bias[s]).

    `coefficients` is [S, K + uses_latent], float64 on the CPU; column k multiplies the feature
    pushed k pushes ago, the latent's column comes last, rows of full steps are zero. `bias` is
    [S] or None. With `autoregressive` every step is pushed into the ring, forecasts included;
    otherwise only full steps are. `split` [S, K + uses_latent, P] holds coefficients of their own
    for each of the P guidance parts of a batched call; they are run where the pipeline tells that
    its calls have so many. `gated` says the same rows once more, for kernels that evaluate the
    paper's gate. Raises LesaError for a field of another type or shape, a value that is not finite,
    a weight at a full step or on a feature that the ring does not hold yet.
    """

    schedule: Schedule
    coefficients: Tensor
    uses_latent: bool = False
    bias: Tensor | None = None
    autoregressive: bool = False
    split: Tensor | None = None
    gated: GatedRows | None = None

    def __post_init__(self) -> None:
        self._check_fields()
        steps = self.schedule.steps
        coefficients = _float64("coefficients", self.coefficients)
        object.__setattr__(self, "coefficients", coefficients)
        if coefficients.ndim != 2 or coefficients.shape[0] != steps or self.history < 1:
            raise LesaError(
                f"coefficients={list(coefficients.shape)}: a wrong shape; a schedule of {steps} "
                f"steps needs [{steps}, K{' + 1' if self.uses_latent else ''}] with K >= 1"
            )
        if self.bias is not None:
            object.__setattr__(self, "bias", _float64("bias", self.bias))
            if self.bias.shape != (steps,):
                raise LesaError(
                    f"bias={list(self.bias.shape)}: a wrong shape; it must be [{steps}]"
                )
        self._check_rows(coefficients)
        if self.split is not None:
            object.__setattr__(self, "split", _float64("split", self.split))
            if self.split.shape[:-1] != coefficients.shape or not self.split.shape[-1]:
                raise LesaError(
                    f"split={list(self.split.shape)}: a wrong shape; beside coefficients "
                    f"{list(coefficients.shape)} it must be [{steps}, {coefficients.shape[1]}, P]"
                )
            for part in self.split.unbind(-1):
                self._check_rows(part)

    def _check_fields(self) -> None:
        """LesaError for a field of another type; whose values are looked at afterwards."""
        if not isinstance(self.schedule, Schedule):
            raise LesaError(
                f"schedule={shown(self.schedule)}: not a Schedule; bind one to the run's step count"
            )
        for name in ("uses_latent", "autoregressive"):
            if not isinstance(value := getattr(self, name), bool):
                raise LesaError(f"{name}={shown(value)}: neither True nor False; give one of them")
        if self.gated is not None and not isinstance(self.gated, GatedRows):
            raise LesaError(f"gated={shown(self.gated)}: not GatedRows; leave it out")

    def _check_rows(self, coefficients: Tensor) -> None:
        rows = coefficients
        if self.bias is not None:
            rows = torch.cat([rows, self.bias[:, None]], dim=1)
        counts = [self.available(step) for step in range(self.schedule.steps)]
        held = torch.tensor(counts, device="cpu")
        features = coefficients[:, : self.history] != 0
        early = features & (torch.arange(self.history, device="cpu") >= held[:, None])
        full = list(self.schedule.full_steps)
        if (step := _first(~rows.isfinite())) is not None:
            wrong = rows[step][~rows[step].isfinite()][0].item()
            raise LesaError(f"coefficients[{step}]={wrong}: not finite; fit or set them again")
        if (at := _first(rows[full] != 0)) is not None:
            raise LesaError(f"step={full[at]}: it is full but has coefficients; set its row to 0")
        if (step := _first(early)) is not None:
            raise LesaError(
                f"step={step}: it weighs column {int(early[step].nonzero().max())} but the ring "
                f"holds {int(held[step])} feature(s) by then; set the later columns to 0"
            )

    @classmethod
    def from_rows(cls, schedule: Schedule, history: int, row: Row) -> Table:
        """A table whose skipped step s weighs its cached steps (newest first) by row(s, cached).

        Raises LesaError as the table does, and where a row is longer than its cached steps.
        """
        history = whole("history", history, 1)
        coefficients = torch.zeros(schedule.steps, history, dtype=torch.float64, device="cpu")
        for step in schedule.skipped_steps:
            cached = schedule.cached_before(step, history)
            weights = row(step, cached)
            if len(weights) > len(cached):
                raise LesaError(
                    f"row={len(weights)} weights: step {step} has {len(cached)} cached feature(s); "
                    "return one for each"
                )
            coefficients[step, : len(weights)] = coefficients.new_tensor(weights)
        return cls(schedule, coefficients)

    @property
    def history(self) -> int:
        """K, the number of features that the ring must hold."""
        return self.coefficients.shape[-1] - self.uses_latent

    @property
    def parts(self) -> int:
        """P, the guidance parts with coefficients of their own, 1 without `split`."""
        return 1 if self.split is None else self.split.shape[-1]

    def part(self, index: int) -> Table:
        """The table of one guidance part; LesaError for a part that it does not have."""
        index = whole("index", index, 0, self.parts - 1)
        if self.split is None:
            return self
        return replace(self, coefficients=self.split[..., index], split=None)

    def trimmed(self, least: int = 1) -> Table:
        """The same without the last columns if no row uses them, since the ring need not hold
        those; but for `least` features."""
        used = self.coefficients != 0
        if self.split is not None:
            used = used | self.split.any(-1)
        width = 1 + max(used[:, : self.history].any(0).nonzero().flatten().tolist(), default=0)
        width = max(width, min(least, self.history))
        kept = [*range(width), *range(self.history, used.shape[1])]
        split = None if self.split is None else self.split[:, kept]
        gated = self.gated and replace(self.gated, weights=self.gated.weights[:, :width])
        return replace(self, coefficients=self.coefficients[:, kept], split=split, gated=gated)

    def available(self, step: int) -> int:
        """How many of the K features the ring holds when `step` begins; LesaError past the end."""
        step = self._step(step)
        if self.autoregressive:
            return min(step, self.history)
        return len(self.schedule.cached_before(step, self.history))

    def used(self, step: int) -> str:
        """What a step is made from: "3 features + latent", or, where the ring holds fewer than K,
        "1 of 3 features + latent"; "model" at a full step."""
        if self.schedule.is_full(step):
            return "model"
        held = self.available(step)
        count = f"{held}" if held == self.history else f"{held} of {self.history}"
        plural = "feature" if count == "1" else "features"
        return f"{count} {plural}{' + latent' if self.uses_latent else ''}"

    def row(self, step: int) -> Tensor:
        """Coefficients [K + uses_latent] of one step, float64; LesaError past the end."""
        return self.coefficients[self._step(step)]

    def apply(
        self, features: Sequence[Tensor] | Tensor, step: int, latent: Tensor | None = None
    ) -> Tensor:
        """The forecast of one skipped step in float64: the reference of every mixing kernel.

        `features` are newest first, at least as many as the step weighs. Raises LesaError at a full
        step, when a weighed feature is missing, or when the table needs a latent and gets none.
        """
        if self.schedule.is_full(step):
            raise LesaError(f"step={step}: full, without a forecast; apply skipped steps only")
        row = self.row(step)
        used = int(row[: self.history].nonzero().max()) + 1 if row[: self.history].any() else 0
        if len(features) < max(used, 1):
            raise LesaError(f"features={len(features)}: step {step} weighs {used}; pass all")
        terms = [row[k] * features[k].double() for k in range(used)]
        if self.uses_latent:
            if latent is None:
                raise LesaError(f"latent=None: the table weighs it at step {step}; pass latent")
            terms.append(row[-1] * latent.double())
        total = sum(terms, torch.zeros_like(features[0], dtype=torch.float64))
        return total if self.bias is None else total + self.bias[step]

    def _step(self, step: int) -> int:
        return whole("step", step, 0, self.schedule.steps - 1)


def _first(wrong: Tensor) -> int | None:
    """The first row that holds a True."""
    return int(wrong.any(1).nonzero()[0]) if bool(wrong.any()) else None


def _float64(name: str, values: Tensor) -> Tensor:
    """A copy on the CPU; LesaError for anything but a dense tensor of real numbers."""
    dense = isinstance(values, Tensor) and values.layout == torch.strided
    if not dense or values.is_complex() or values.is_meta or values.dtype == torch.bool:
        raise LesaError(
            f"{name}={shown(values)}: not a dense tensor of numbers; give torch.tensor(...)"
        )
    return values.detach().to("cpu", torch.float64).clone()
