"""What training costs: rows of the denoiser, counted from outside, and bars that end where they
said they would."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from training_jobs import STEPS, make_job

import lesa
from lesa.util.progress import Progress


class Watched(Progress):
    """Keeps every bar."""

    def __init__(self):
        super().__init__(quiet=True)
        self.bars = []

    @contextmanager
    def bar(self, *about):
        with super().bar(*about) as bar:
            self.bars.append(bar)
            yield bar


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("flux", {}),
        ("flux", {"tap": "hidden"}),
        ("flux", {"form": "paper"}),
        ("qwen", {}),
        ("sdxl", {"num_images_per_prompt": 2}),
    ],
)
def test_every_phase_ends_at_its_total_and_the_cost_is_what_ran(name, more):
    job = make_job(name)
    rows, shown = [], Watched()
    model = job.models[0]  # a skipped step at the hidden tap runs its forward, but no block
    watched = model.transformer_blocks[0] if name == "flux" else model
    hook = watched.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(next(iter([*args, *kwargs.values()])))),
        with_kwargs=True,
    )
    lesa.train(
        job.pipe,
        job.prompts,
        STEPS,
        3,
        call=job.call,
        batch_size=2,
        refine=2,
        polish=2,
        progress=shown,
        **more,
    )
    hook.remove()
    assert len(shown.bars) >= 3
    for bar in shown.bars:
        assert bar.completed == bar.total, bar.title
    pictures = len(job.prompts) * more.get("num_images_per_prompt", 1)
    plain = STEPS * pictures * 2  # guidance
    whole = sum(rows) / plain * len(job.prompts)
    each = f"{whole / len(job.prompts):.1f} plain generations per prompt"
    assert shown.lines[-1] == f"cost: {each}, {whole:.0f} in all"
