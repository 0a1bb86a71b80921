"""The learned forecaster: a form, and rows calibrated to particular step lists."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lesa.core.forecaster import Tap, check_sigmas
from lesa.core.schedule import Schedule
from lesa.core.table import Table
from lesa.errors import LesaError
from lesa.forecasters import checkpoint, hub
from lesa.forecasters.calibrated import Calibrated
from lesa.forecasters.calibration import Calibration
from lesa.forecasters.continuous import ContinuousForm, TableForm
from lesa.forecasters.damping import Rows, carried, damped, overguided, prior_line, reuse
from lesa.forecasters.disca import DiscaForm
from lesa.forecasters.mismatch import Excess, Mismatch, excess, mismatch
from lesa.forecasters.moments import Moments
from lesa.forecasters.paper import PaperForm
from lesa.forecasters.settings import Settings

_NETS: dict[str, type[TableForm] | type[PaperForm]] = {
    "continuous": ContinuousForm,
    "disca": DiscaForm,
    "paper": PaperForm,
    "table": TableForm,
}


class LesaForecaster(Calibrated):
    """A forecaster whose coefficients are learned; its parameters are fp32 or fp64, never less.

    `LesaForecaster(form="continuous", metadata=None, **fields)`, fields as in `Settings`.
    continuous: extrapolation in sigma + a KAN of continuous time, for any steps (untrained: the
    extrapolation). paper: eqs. 4-7, for one step count. table: only the calibrated rows, elsewhere
    the extrapolation. disca: rows and a network that runs on skipped steps, for one list
    (`lesa.forecasters.disca`). For a calibrated (schedule, sigmas), `table` returns the calibrated
    rows. `net` holds the parameters (ContinuousForm, PaperForm, ...), `moments` what training saw,
    `metadata` says what it was trained for. Raises LesaError for a wrong field.
    """

    def __init__(
        self, form: str = "continuous", *, metadata: Mapping[str, Any] | None = None, **fields: Any
    ) -> None:
        super().__init__()
        self.settings = Settings(form=form, **fields)
        self.metadata = dict(metadata or {})
        self.calibrations: list[Calibration] = []
        self.moments = Moments()
        # parameters that can be fitted, whatever mode they are made in
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            self.net = _NETS[form](self.settings)

    @property
    def name(self) -> str:
        """ "lesa" for the default form, else "lesa-" and what differs."""
        s = self.settings
        if s.form != "paper":
            return "lesa" if s.form == "continuous" else f"lesa-{s.form}"
        return f"lesa-paper-{'mlp' if s.gate == 'mlp' else s.spline}"

    @property
    def tap(self) -> Tap:
        """The feature it was trained on."""
        return self.settings.tap

    def history(self, schedule: Schedule) -> int:
        """K, the same for every schedule but those that add full steps to a calibrated one: their
        tables hold the added features too."""
        return self.net.history

    def stage_of(self, sigma: float) -> int:
        """The expert for a noise level: 0 above stages[0], the last at and below stages[-1]."""
        return self.settings.stage_of(sigma)

    def coefficients(
        self, target_sigma: Tensor, cached_sigmas: Tensor, valid: Tensor, branch: str = "cond"
    ) -> Tensor:
        """The form's differentiable float64 [N, K + uses_latent], without calibrated rows.

        target_sigma [N]; cached_sigmas [N, K], newest first; valid [N, K] bool, a prefix of each
        row, at least its first. LesaError in the paper form, which knows no continuous time.
        """
        if isinstance(self.net, PaperForm):
            raise LesaError("form='paper': no coefficients of continuous time; use net.rows")
        return self.net.coefficients(target_sigma, cached_sigmas, valid, self.branch(branch))

    def table(
        self,
        schedule: Schedule,
        sigmas: Sequence[float],
        branch: str = "cond",
        *,
        noise: bool = False,
        multistep: bool = False,
        guidance: float = 1.0,
    ) -> Table:
        """The table to run: the calibrated rows of this very (schedule, sigmas), or of the list
        that it adds full steps to. A calibrated forecaster carries its rows over to other runs,
        else it damps, or takes the prior's line where gaps are narrow (`lesa.forecasters.damping`);
        one without calibration has the form's rows.

        With `noise`, from a sampler that adds noise where that of the training did not, it reuses;
        with `multistep`, from one that extrapolates over its steps, it takes no line. At `guidance`
        times the trained scale all rows are damped, where that is above 1.
        Raises LesaError for an unbound schedule, wrong sigmas, an unknown branch or, in the paper
        form, another step count.
        """
        levels, branch = check_sigmas(schedule, sigmas), self.branch(branch)
        if isinstance(self.net, PaperForm):
            return self._paper_table(self.net, schedule, levels, branch)
        if isinstance(self.net, DiscaForm):
            fitted = self.calibration(schedule, levels) is not None
            self.net.check_run(fitted, self.calibrated)
        if noise:
            return Table(schedule, reuse(schedule, self._width), self.uses_latent)
        found = self._fitted(schedule, levels, branch)
        if found is None and any(branch in entry.rows for entry in self.calibrations):
            found = self._away(schedule, levels, branch, multistep)
        if found is None:
            with torch.no_grad():
                found = Rows(self.net.rows(schedule, levels, branch)[0])
        if guidance > 1:
            found = overguided(found, schedule, guidance)
        return Table(schedule, found.shared, self.uses_latent, split=found.split)

    def _paper_table(
        self, net: PaperForm, schedule: Schedule, levels: tuple[float, ...], branch: str
    ) -> Table:
        with torch.no_grad():
            rows, bias = net.rows(schedule, levels, branch)
        gated = net.gated(schedule, levels, branch)
        return Table(schedule, rows, False, bias, net.autoregressive, gated=gated)

    def _away(
        self, schedule: Schedule, levels: tuple[float, ...], branch: str, multistep: bool
    ) -> Rows:
        """Rows for a run that no calibration matches."""
        history, latent = self.net.history, self.uses_latent
        gram = self.moments.at(branch, levels[:-1], latent)
        if gram is None:
            base = reuse(schedule, self._width)
        else:
            line = None if multistep else prior_line(schedule, levels, self._width)
            base = damped(schedule, gram, history, latent, self.moments.places(levels), line)
        return carried(base, self.calibrations, schedule, levels, branch, history)

    @property
    def _width(self) -> int:
        return self.net.history + self.uses_latent

    def mismatch(
        self, schedule: Schedule, sigmas: Sequence[float], sampler: str = "", noise: bool = False
    ) -> Mismatch | None:
        """How a run differs from what was calibrated, with the remedy; None where it does not.

        `sampler` is the class of its scheduler, `noise` whether that one adds noise.
        """
        trained = str(self.metadata.get("scheduler", ""))
        noise = noise and not self.metadata.get("noise", sampler == trained)
        known = [] if self.form in ("paper", "disca") else self.calibrations
        fitted = (self._fitted(schedule, tuple(sigmas), name) for name in self.branches if known)
        kept = any(rows is not None for rows in fitted)
        return mismatch(known, trained, schedule, sigmas, sampler, noise, kept)

    def excess(
        self, scales: Mapping[str, float], embedded: bool, guided: bool = False
    ) -> Excess | None:
        """The scale of guidance of a run, by the name of the pipeline's argument, that is most
        above that of the training; None where none is, or none matters.

        `embedded` says whether the denoiser is told the scale, `guided` whether its calls hold
        several parts of every picture.
        """
        if self.form in ("paper", "disca") or not self.calibrations:
            return None
        trained = self.metadata.get("guidance")
        if trained is None:  # as saved by an earlier lesa
            call = self.metadata.get("call", {})
            trained = {
                name: call[name] for name in scales if isinstance(call.get(name), (int, float))
            }
        parts = len(self.branches) > 1 or any(entry.split for entry in self.calibrations)
        before = bool(self.metadata.get("guided", parts))
        return excess(trained, scales, embedded, before, guided)

    def check_model(
        self,
        model_class: str,
        tap: str | None = None,
        branches: Sequence[str] = (),
        **identity: Any,
    ) -> None:
        """LesaError, naming both sides, unless it was trained for such a model.

        `identity` are further metadata to compare (model_id, model_hash, ...); what was not
        recorded in training, or is None, is not compared.
        """
        for field, found in {"model_class": model_class, **identity}.items():
            trained = self.metadata.get(field)
            if trained is not None and found is not None and trained != found:
                raise LesaError(
                    f"the forecaster was trained for {field}={trained!r}, this model has "
                    f"{found!r}; train one for this model with lesa.train"
                )
        if tap is not None and tap != self.tap:
            raise LesaError(
                f"the forecaster was trained on tap={self.tap!r}, asked is {tap!r}; "
                f"leave tap out or train with tap={tap!r}"
            )
        for name in branches:
            self.branch(name)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write model.safetensors and config.json; see `lesa.forecasters.checkpoint.save`."""
        checkpoint.save(self, folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Commit weights, config and a model card to a repository of the Hugging Face Hub, which
        `from_pretrained` reads; the commit's address. Options: see `lesa.forecasters.hub.push`."""
        return hub.push(self, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, revision: str | None = None
    ) -> LesaForecaster:
        """Read a folder or a Hub id, at a revision; see `lesa.forecasters.checkpoint.load`."""
        return checkpoint.load(source, cls, revision)
