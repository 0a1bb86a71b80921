"""The nodes of lesa for ComfyUI: copy or link this folder into its `custom_nodes`.

lesa itself must be installed where ComfyUI runs. Forecasters lie in `models/lesa`, one folder each,
as `lesa.train` or `lesa train` saves them; those without training need no folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths  # of ComfyUI
from comfy_api.latest import ComfyExtension, io

from lesa.engine.config import LesaConfig
from lesa.forecasters.named import named
from lesa.integrations.comfyui import apply

_Forecaster = io.Custom("LESA_FORECASTER")
_UNTRAINED = ["lesa-untrained", "taylor-1", "fora"]


def _folder() -> Path:
    return Path(folder_paths.models_dir) / "lesa"


def _trained() -> list[str]:
    return sorted(path.parent.name for path in _folder().glob("*/config.json"))


class LesaForecasterLoader(io.ComfyNode):
    """Reads a trained forecaster of `models/lesa`, or makes one that needs no training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        return io.Schema(
            node_id="LesaForecasterLoader",
            display_name="Load lesa forecaster",
            category="model/lesa",
            inputs=[io.Combo.Input("forecaster", options=[*_UNTRAINED, *_trained()])],
            outputs=[_Forecaster.Output(display_name="forecaster")],
        )

    @classmethod
    def execute(cls, forecaster: str) -> io.NodeOutput:
        """The forecaster; LesaError where its folder cannot be read."""
        return io.NodeOutput(
            named(forecaster if forecaster in _UNTRAINED else _folder() / forecaster)
        )


class LesaApply(io.ComfyNode):
    """A model most of whose steps are forecast, with a budget."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        return io.Schema(
            node_id="LesaApply",
            display_name="Apply lesa",
            category="model/lesa",
            inputs=[
                io.Model.Input("model"),
                _Forecaster.Input("forecaster"),
                io.Int.Input(
                    "full_steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Steps that the model computes; 0 leaves it to the forecaster.",
                ),
                io.Float.Input(
                    "target_speedup",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Instead of full_steps, how many times faster; 0 for no target.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, model: Any, forecaster: Any, full_steps: int, target_speedup: float
    ) -> io.NodeOutput:
        """The patched clone; LesaError where the budget or the forecaster does not fit."""
        speedup = target_speedup or None
        config = LesaConfig(forecaster, full_steps=full_steps or None, target_speedup=speedup)
        return io.NodeOutput(apply(model, config))


class LesaExtension(ComfyExtension):
    """What ComfyUI loads."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The two nodes."""
        return [LesaForecasterLoader, LesaApply]


def comfy_entrypoint() -> LesaExtension:
    """Called by ComfyUI when it loads the folder."""
    return LesaExtension()
