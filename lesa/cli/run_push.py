"""`lesa push`: a forecaster and its model card on the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lesa.cli.checks import DRAWING
from lesa.cli.run_inspect import worth_picture
from lesa.forecasters.lesa import LesaForecaster


def run_push(folder: str, repo: str, *, pictures: Sequence[Path] = (), **options: Any) -> str:
    """Uploads it; where matplotlib is installed and training measured its lists, a plot of what
    they are worth comes before the given pictures. The commit's address."""
    trained = LesaForecaster.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as made:
        shown = list(pictures)
        plot = worth_picture(trained) if find_spec(DRAWING[0]) is not None else None
        if plot is not None:
            path = Path(made) / "worth.png"
            path.write_bytes(plot)
            shown.insert(0, path)
        return trained.push_to_hub(repo, pictures=shown, **options)
