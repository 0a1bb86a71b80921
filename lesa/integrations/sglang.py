"""lesa inside SGLang's diffusion runtime: its two seams for what the blocks return.

`Cache` has the methods of `DiffusionCache`, which a DiT asks in its forward; `states(...)` are what
`DPCacheMixin` reads from `batch.dpcache_states`. Both forecast at lesa's hidden tap, so that the
model's own last norm and projection run at every step. Neither looks at a tensor's values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lesa.errors import LesaError
from lesa.hooks.generation import Generation
from lesa.hooks.noise_levels import own_noise_levels
from lesa.integrations.engines import engine
from lesa.integrations.stream import Plan, hidden_config, run_of

__all__ = ["Cache", "State", "states"]


class State:
    """One request and one guidance branch, with the names of `DPCacheState`: `is_full_step(step)`,
    then `record(step, feature)` or `predict(step)`."""

    def __init__(self, plan: Plan, run: Generation, branch: str) -> None:
        self._full, self._stream = plan.schedule(run), plan.stream(run, branch)
        self.full_steps, self.num_steps = frozenset(self._full.full_steps), run.num_steps
        self.num_full = self.num_predicted = 0

    def is_full_step(self, step: int) -> bool:
        """Whether the blocks run: as scheduled, and where the features for a forecast are not
        there."""
        return not self._stream.skips(step)

    def record(self, step: int, feature: Tensor) -> None:
        """Take what the blocks returned."""
        self._stream.keep(step, feature)
        self.num_full += 1

    def predict(self, step: int) -> Tensor:
        """What they would return; LesaError at a full step."""
        self.num_predicted += 1
        return self._stream.forecast(step)


def states(batch: Any, forecaster: Any = None, **options: Any) -> dict[bool, State]:
    """The states of a request by `is_cfg_negative`, for `batch.dpcache_states`.

    Args:
        batch: SGLang's request after its timesteps were set: `scheduler`, or `sigmas` and
            `num_inference_steps`; `do_classifier_free_guidance`.
        forecaster, options: as for `lesa.enable`; made for the hidden tap or for any.

    Raises:
        LesaError: an option is invalid, or the request contradicts it.
    """
    plan, run = Plan(hidden_config("SGLang", forecaster, options)), _run(batch)
    found = {False: State(plan, run, "cond")}
    if getattr(batch, "do_classifier_free_guidance", False):
        found[True] = State(plan, run, "uncond")
    return found


class Cache:
    """A `DiffusionCache` (`maybe_reset`, `should_skip`, `write`, `read`) for a DiT's `cache`.

    Args:
        forecaster, options: as for `lesa.enable`; made for the hidden tap or for any.
        context: gives the forward context of a call; SGLang's own if None.

    Raises:
        LesaError: an option is invalid; at the first step of a request where it contradicts it.
    """

    def __init__(
        self, forecaster: Any = None, *, context: Callable[[], Any] | None = None, **options: Any
    ) -> None:
        self._options = {"forecaster": forecaster, **options}
        hidden_config("SGLang", forecaster, options)
        self._context = context or _context
        self._states: dict[bool, State] = {}
        self._batch: Callable[[], Any] = lambda: None  # weakly: a request holds its latents

    def maybe_reset(self, **kwargs: Any) -> None:
        """Begin anew where the call is the first one of another request."""
        batch, step, _ = self._now()
        if batch is not self._batch() or (step == 0 and not batch.is_cfg_negative):
            self._states, self._batch = states(batch, **self._options), weakref.ref(batch)

    def should_skip(self, **kwargs: Any) -> bool:
        """Whether `read` gives what the blocks would."""
        _, step, state = self._now()
        return not state.is_full_step(step)

    def write(self, hidden_states: Tensor, original_hidden_states: Any = None, **_: Any) -> None:
        """Take what the blocks made of the original states, which are not needed."""
        _, step, state = self._now()
        state.record(step, hidden_states)

    def read(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """What the blocks would make of these."""
        _, step, state = self._now()
        return state.predict(step)

    def calibrate(self, **kwargs: Any) -> None:
        """Nothing is learned here: `lesa.train` does that."""

    def _now(self) -> tuple[Any, int, Any]:
        context = self._context()
        batch = context.forward_batch
        return batch, context.current_timestep, self._states.get(bool(batch.is_cfg_negative))


def _context() -> Any:
    where = "multimodal_gen.runtime.managers.forward_context"
    return engine(f"sglang.{where}", "", "sglang").get_forward_context()


def _run(batch: Any) -> Generation:
    scheduler, sigmas = getattr(batch, "scheduler", None), getattr(batch, "sigmas", None)
    if hasattr(scheduler, "timesteps") and hasattr(scheduler, "sigmas"):
        return run_of(scheduler)
    if sigmas is None:
        raise LesaError(
            "batch: neither a scheduler with sigmas nor sigmas; set its timesteps before the cache"
        )
    levels = [*map(float, sigmas)]
    if len(levels) == batch.num_inference_steps:
        levels.append(0.0)
    run = Generation(num_steps=len(levels) - 1, sampler=type(scheduler).__name__)
    run.sigmas = run.times = own_noise_levels(batch.num_inference_steps, levels)
    return run
