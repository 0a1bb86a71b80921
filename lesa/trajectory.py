"""One generation in one guidance branch: its plan, its ring, and what must not change."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lesa import ranges
from lesa.call import Call, Refusal
from lesa.clock import Step
from lesa.denoiser import Run, make_output, read_sample
from lesa.mixer import Mixer
from lesa.plan import Plan
from lesa.ring import Ring
from lesa.tail import ModulatedTail, PreparedTail

__all__ = ["Trajectory"]

_NUMBERS = (int, float, str)


class Trajectory:
    """The steps from `origin` on, of one generation in one branch.

    Keeps K features in `ring` and weak references to the conditioning; nothing else. The ring goes
    with the last skipped step, or with the tensors that only the caller's loop holds: a run that
    broke off leaves none behind, once its traceback is gone.
    """

    def __init__(self, plan: Plan, call: Call, tails: ModulatedTail | None = None) -> None:
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
        self._kinds = _kinds(call)
        self._gone = _releaser(self)
        self._conditioning = [
            (self._held(value), _version(value)) for _, value in _conditioning(call)
        ]
        places = [call.argument(name) for name in call.denoiser.spec.unbatched]
        self._places = [weakref.ref(place) for place in places if isinstance(place, Tensor)]

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
        if _kinds(call) != self._kinds:
            return "an argument appeared or vanished"
        for (name, value), (known, version) in zip(
            _conditioning(call), self._conditioning, strict=False
        ):
            if not _is(value, known) or _version(value) != version:
                return f"{name} changed"
        if self._places:
            self._watch_places(call)
        return None

    def release(self) -> None:
        """Let go of the features and of all that a forecast needs."""
        self.ring = self._mixer = self._tail = None

    def _held(self, value: Any) -> Any:
        """A conditioning argument; when a tensor dies no later call can continue this run."""
        return weakref.ref(value, self._gone) if isinstance(value, Tensor) else value

    def _watch_places(self, call: Call) -> None:
        """At the second call: position tensors that both got are the loop's own, and end with it.

        Prompt embeddings may belong to the user, who keeps them.
        """
        places = [call.argument(name) for name in call.denoiser.spec.unbatched]
        known = [place() for place in self._places]
        self._places = []
        self._watched = [
            weakref.ref(place, self._gone)
            for place in places
            if isinstance(place, Tensor) and any(place is other for other in known)
        ]

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
        with ranges.tail:
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


def _kinds(call: Call) -> tuple[type, ...]:
    """Tells which arguments there are: None has a type of its own."""
    return tuple(map(type, call.kwargs.values()))


def _conditioning(call: Call) -> Iterator[tuple[str, Any]]:
    """What the features come from besides latent and time, which is the same at every step."""
    for name in call.denoiser.spec.conditioning:
        yield name, call.argument(name)
    for name, value in call.kwargs.items():
        if value.__class__ is dict:  # image embeddings, time ids, LoRA scales
            for key, part in value.items():
                for item in part if part.__class__ is list else (part,):
                    yield f"{name}[{key!r}]", item


def _releaser(trajectory: Trajectory) -> Callable[[object], None]:
    """For weak references: releases the trajectory, which it does not keep alive."""
    own = weakref.ref(trajectory)

    def release(_: object) -> None:
        found = own()
        if found is not None:
            found.release()

    return release


def _is(value: Any, held: Any) -> bool:
    if isinstance(value, Tensor):
        return isinstance(held, weakref.ref) and held() is value
    return value is held or (value.__class__ in _NUMBERS and value == held)


def _version(value: Any) -> int:
    """Counts in-place writes; inference tensors have no such counter."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
