"""report.html: one file that needs no other one and no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from lesa.evaluation.comparison import Comparison, Worst, attempted
from lesa.evaluation.pictures import in_page, png_width
from lesa.evaluation.printable import printable
from lesa.evaluation.tables import headlines, page_table
from lesa.evaluation.views import first_row, grid, in_grid, sentence, sliders, strips, worst_grid
from lesa.util.versions import versions

_CHARTS = {  # heading and what is drawn, in the order of the page
    "quality-full-steps.png": (
        "Quality against work",
        "PSNR mean and 10th percentile (p10) of every method against its number of full steps",
    ),
    "quality-seconds.png": (
        "Quality against time",
        "PSNR mean and 10th percentile (p10) of every method against measured seconds",
    ),
    "quality-tflops.png": (
        "Quality against TFLOP",
        "PSNR mean and 10th percentile (p10) of every method against TFLOP",
    ),
    "error-per-step.png": (
        "Error per step",
        "Relative error of the latent after each step, by method; markers stand on full steps",
    ),
    "paired.png": (
        "lesa minus every peer, on the same prompts",
        "Paired differences between lesa and every peer in dB, with intervals",
    ),
}


def html(
    comparison: Comparison,
    found: Sequence[dict[str, Any]],
    title: str,
    figures: Mapping[str, bytes],
    shown: Sequence[str] | None = None,
) -> str:
    """The page; `found` are the comparison's `duels`, `figures` PNG by file name.

    Pictures that cannot be shown are left out, with a note of the comparison.
    """
    from jinja2 import Environment, FunctionLoader

    rows, steps = comparison.rows, comparison.settings["num_inference_steps"]
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(_source)
    )
    environment.filters |= {"signed": _signed, "printable": printable}
    labels = in_grid(rows, shown)
    pictures = attempted(comparison, "the grid of the page", lambda: grid(comparison, labels))
    facts = comparison.to_dict()
    return environment.get_template("report.html.j2").render(
        title=title,
        sentence=sentence(comparison),
        first=first_row(rows),
        grid=pictures,
        slider=pictures and sliders(comparison, pictures),
        strips=strips(comparison),
        steps=steps,
        levels=comparison.noise_levels,
        headlines=headlines(rows, found),
        duels=found,
        charts=_charts(figures),
        worst=_worst(comparison),
        table=page_table(rows, facts["plain"], steps),
        has_u8wrap=any("psnr_u8wrap" in row for row in rows),
        versions=versions(),
        **{key: facts[key] for key in ("prompts", "plain", "notes")},
    )


def _source(name: str) -> str:
    return files("lesa.evaluation").joinpath(name).read_text(encoding="utf-8")


def _charts(figures: Mapping[str, bytes]) -> list[dict[str, Any]]:
    return [
        {
            "file": file,
            "title": title,
            "alt": alt,
            "src": in_page(figures[file]),
            "width": png_width(figures[file]) // 5 * 4,  # a little sharper than the page
        }
        for file, (title, alt) in _CHARTS.items()
        if file in figures
    ]


def _worst(comparison: Comparison) -> list[dict[str, Any]]:
    def view(part: Worst) -> dict[str, Any] | None:
        what = f"the worst prompts of {part.label} in the page"
        return attempted(comparison, what, lambda: worst_grid(part, comparison.rows))

    return [found for found in map(view, comparison.worst) if found]


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("inf", "∞")
