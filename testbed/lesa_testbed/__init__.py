"""Small, truly trained pipelines of the diffusers classes: the folders of `pipelines/`, the scenes
that they were trained on, and the makers that train them. `lesa.testbed` loads them.

`reference` holds lesa's kernels in float64, which tests and benchmarks measure the kernels against.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["FOLDER"]

FOLDER = Path(__file__).parent / "pipelines"
