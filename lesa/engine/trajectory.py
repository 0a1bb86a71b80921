"""One generation in one guidance branch: its plan, its ring, and what must not change."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lesa.engine import nvtx_ranges
from lesa.engine.call import Call, Refusal
from lesa.engine.conditioning import Conditioning
from lesa.engine.mixer import Mixer
from lesa.engine.ring import Ring
from lesa.engine.step_table import StepTable
from lesa.engine.tail import ModulatedTail, PreparedTail
from lesa.hooks.denoiser import Run, make_output, read_sample
from lesa.hooks.step_clock import Step

__all__ = ["Trajectory"]


class Trajectory:
    """The steps from `origin` on, of one generation in one branch.

    Keeps K features in `ring` and weak references to the conditioning; nothing else. The ring goes
    with the last skipped step, or with the tensors that only the caller's loop holds: a run that
    broke off leaves none behind, once its traceback is gone.
    """

    def __init__(self, plan: StepTable, call: Call, tails: ModulatedTail | None = None) -> None:
        self.plan = plan
        self.origin = call.step.index
        self.ring: Ring | None = None
        self._mixer: Mixer | None = None
        self._kind: Any = None
        self._tails = tails
        self._tail: PreparedTail | None = None
        self._latent = _layout(call.argument(call.denoiser.spec.latent))
        self._return_dict = call.argument("return_dict")
        self._states = {call.denoiser: call.denoiser.state}
        self._conditioning = Conditioning(call, _releaser(self))

    def skips(self, step: Step) -> bool:
        """Whether the plan forecasts this step."""
        return self.plan.rows[step.index - self.origin] is not None

    def disturbance(self, call: Call) -> str | None:
        """Why the cached features do not fit this call, if so."""
        if self.origin + len(self.plan.rows) != call.step.num_steps:
            return "number of steps changed"
        if _layout(call.argument(call.denoiser.spec.latent)) != self._latent:
            return "latent changed in shape, dtype or device"
        if call.argument("return_dict") is not self._return_dict:
            return "return_dict changed"
        state = call.denoiser.state
        if self._states.setdefault(call.denoiser, state) != state:  # a pipeline may have two
            return "adapters, attention processors or the ControlNet's scale changed"
        return self._conditioning.change(call)

    def release(self) -> None:
        """Let go of the features and of all that a forecast needs."""
        self.ring = self._mixer = self._tail = None

    def forecast(self, call: Call, tap: str) -> Any:
        """The output of a skipped step; Refusal where there is none."""
        plan, ring, index = self.plan, self.ring, call.step.index - self.origin
        if ring is None or self._mixer is None or ring.pushed != plan.expected[index]:
            raise Refusal("missing history")
        latent = None
        if plan.uses_latent:
            latent = call.argument(call.denoiser.spec.latent)
            if not isinstance(latent, Tensor) or latent.shape != ring.features[0].shape:
                raise Refusal("latent and output differ in shape")
        pushes, tail = plan.pushes[index], self._tail
        feature: Tensor | None
        if tail is not None and tail.takes(call):
            if not tail.knows(call.step):
                self._run_without_blocks(call, ring.features[0])
            feature = torch.empty_like(ring.features[0]) if pushes else None
            output = make_output(self._kind, tail.run(index, self._mixer, feature))
        else:
            feature = self._mixer(index, torch.empty_like(ring.features[0]), latent)
            if tap == "output":
                output = make_output(self._kind, feature)
            else:
                output = self._run_without_blocks(call, feature)
        if pushes and feature is not None:
            ring.push(feature)
        if index == plan.last:  # before a VAE decodes, when memory is scarcest
            self.release()
        return output

    def _run_without_blocks(self, call: Call, feature: Tensor) -> Any:
        with nvtx_ranges.tail:
            run = call.denoiser.run_tail(feature, call.args, call.kwargs)
        if run.output is None:
            raise Refusal("feature and tail differ in shape")
        if self._tails is not None:
            self._tails.record(call.step, run.embedded)
        return run.output

    def keep(self, call: Call, run: Run, tap: str) -> bool:
        """Take the feature of a full step into the ring if a later step needs it.

        Returns:
            Whether a ring was made for it.

        Raises:
            Refusal: the model gave no such feature, or one that does not fit the ring.
        """
        if self._tails is not None:
            self._tails.record(call.step, run.embedded)
        if not self.plan.pushes[call.step.index - self.origin]:
            return False
        sample, self._kind = read_sample(run.output), type(run.output)
        feature = run.feature if tap == "hidden" else sample
        if feature is None:
            raise Refusal(f"no single tensor at the {tap} tap")
        made = self.ring is None
        if self.ring is None:
            data = None
            if self._tails is not None and sample is not None:
                self._tail = self._tails.prepare(call, run.embedded, feature)
                if self._tail is not None:
                    data = self._tail.claim(call, self.plan, feature)
            self.ring = Ring(self.plan.history, feature, data)
            self._mixer = Mixer(self.plan, self.ring)
        elif not self.ring.matches(feature):
            raise Refusal("feature changed in shape, dtype or device")
        self.ring.push(feature)
        return made


def _layout(latent: Any) -> tuple[Any, ...]:
    if isinstance(latent, Tensor):
        return latent.shape, latent.dtype, latent.device
    return tuple(_layout(part) for part in latent or ())


def _releaser(trajectory: Trajectory) -> Callable[[Any], None]:
    """For weak references: releases the trajectory, which it does not keep alive."""
    own = weakref.ref(trajectory)

    def release(_: Any) -> None:
        found = own()
        if found is not None:
            found.release()

    return release
