"""DisCa's predictor: two blocks that forecast what all blocks of a model would give."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lesa.hooks.model_specs import model_spec

EMBEDDERS = {"FluxTransformer2DModel": "x_embedder", "QwenImageTransformer2DModel": "img_in"}


class Predictor(nn.Module):
    """Two blocks of the model's own class that forecast the feature before the final norm.

        h = c + out(blocks(join([x, c])))

    with the current tokens x behind the model's embedder and the last full step's feature c, both
    [B, L, C]; `join` is 2C -> C, `out` C -> C. The blocks begin as copies of the model's last two,
    `join` hands on c and `out` is 0, so that an untrained predictor is reuse. It is called as a
    block of the model is, and stands in for all of them.
    Source: DisCa (arXiv 2602.05449): two DiT blocks on current and cached tokens. How they are
    joined and begin is not published and decided here.
    """

    cached: Tensor  # c, set before a call

    def __init__(self, model: Any) -> None:
        super().__init__()
        blocks = [block for name in containers(model) for block in getattr(model, name)]
        width = getattr(model, EMBEDDERS[type(model).__name__]).out_features
        self.join, self.out = nn.Linear(2 * width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(copy.deepcopy(blocks[-2:]))
        for module in self.blocks.modules():  # weights loaded in inference mode know no gradients
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(ordinary(parameter))
            for name, buffer in module._buffers.items():
                module._buffers[name] = ordinary(buffer)
        with torch.no_grad():
            self.join.weight.copy_(torch.eye(width, 2 * width).roll(width, 1))
            for parameter in (self.join.bias, *self.out.parameters()):
                parameter.zero_()
        like = next(model.parameters())
        self.to(device=like.device, dtype=like.dtype).eval()

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        """Embedded text [B, M, C], which the model drops, and the forecast [B, L, C]."""
        text, x = encoder_hidden_states, self.join(torch.cat([hidden_states, self.cached], -1))
        for block in self.blocks:
            text, x = block(hidden_states=x, encoder_hidden_states=text, **rest)
        return text, self.cached + self.out(x)


def ordinary(value: Any) -> Any:
    """A tensor of inference mode as an ordinary one; everything else as it is."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def containers(model: Any) -> tuple[str, ...]:
    """Names of the model's lists of blocks, in the order in which they run."""
    return model_spec(model).blocks
