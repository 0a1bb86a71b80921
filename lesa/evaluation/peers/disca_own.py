"""lesa's own form "disca" as a method: trained on the bench, on the list that it chooses."""

from __future__ import annotations

from dataclasses import dataclass

from lesa.core.schedule import Schedule
from lesa.evaluation.method import Bench, Method
from lesa.evaluation.peers.thresholds import needs_calibration
from lesa.evaluation.peers.trained import trained
from lesa.evaluation.ranking import OTHER_FORM
from lesa.hooks.alone import unfit_class
from lesa.hooks.pipeline import find_denoiser

MOST_STEPS = 16  # two blocks pay where a step is a good part of the run


@dataclass(frozen=True)
class OwnDisca:
    """A forecaster of form "disca", trained anew for each number of full steps."""

    takes_lists = False

    def unfit(self, bench: Bench) -> str | None:
        """It needs few steps, blocks that run alone, and prompts to be trained on."""
        if bench.num_steps > MOST_STEPS:
            return f"is made for few-step models; give at most {MOST_STEPS} steps"
        if bench.pipe is None:
            return "needs a pipeline"
        model = find_denoiser(bench.pipe)
        if (reason := unfit_class(model)) is not None:
            return f"cannot run the blocks of {type(model).__name__} alone ({reason}); leave it out"
        return needs_calibration(bench)

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """On the list that its training chooses, or on a given one."""
        listed = None if searched is None else searched.bind(bench.num_steps)
        count = wanted if listed is None else len(listed.full_steps)
        forecaster = trained(bench, count, form="disca", schedule=searched)
        share = forecaster.metadata["network_share"]
        return Method(
            name,
            bench.num_steps,
            forecaster,
            forecaster.calibrated[0],
            "searched" if searched else "own",
            note=f"a network of {100 * share:.1f} % of the parameters on skipped steps",
        )


OWN_DISCA = {OTHER_FORM: OwnDisca()}
