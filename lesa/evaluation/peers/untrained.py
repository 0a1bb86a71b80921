"""What `lesa.enable(pipe)` does with a number of full steps: the prior, nothing trained."""

from __future__ import annotations

from lesa.core.schedule import Schedule
from lesa.evaluation.method import Bench, Method
from lesa.evaluation.peers.per_run_cache import once_per_bench
from lesa.evaluation.runs import levels_of, step_flops
from lesa.forecasters.prior import Prior, prior_schedule
from lesa.hooks.prompt_inputs import settings_of

__all__ = ["UNTRAINED"]


class Untrained:
    """lesa's prior, on its own list for the noise levels of the bench's run."""

    takes_lists = False

    def unfit(self, bench: Bench) -> str | None:
        """It runs on every pipeline."""
        return None

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """With exactly the wanted number of full steps."""
        schedule = prior_schedule(wanted, bench.num_steps, _levels(bench))
        return Method(name, bench.num_steps, Prior(), schedule)


@once_per_bench
def _levels(bench: Bench) -> list[float]:
    """The noise levels of the bench's run, from its first step; none without a pipeline."""
    if bench.pipe is None:
        return []
    prompts = [*bench.calibration] or ["a picture"]
    embedded = bench.settings.get("prompt_embeds")
    count = len(prompts) if embedded is None else len(embedded)
    settings = settings_of(bench.settings, [0], count) | {"num_inference_steps": bench.num_steps}
    step_flops(bench.pipe, prompts[0], settings, 1)
    return levels_of(bench.pipe, bench.num_steps)


UNTRAINED = {Prior.name: Untrained()}
