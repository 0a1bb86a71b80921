"""By what weights are told from others."""

from __future__ import annotations

import hashlib

import torch


def weights_hash(model: torch.nn.Module) -> str:
    """Hash of names, shapes and first values of all weights, rounded to bfloat16.

    The rounding makes it the same for any dtype that the weights are loaded in.
    """
    digest, weights = hashlib.sha256(), model.state_dict()
    first = _on_host(
        {
            name: weight.detach().flatten()[:16].float()
            for name, weight in weights.items()
            if weight.device.type != "meta" and weight.is_floating_point()
        }
    )
    for name, weight in sorted(weights.items()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        if name in first:
            digest.update(first[name].bfloat16().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _on_host(vectors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same vectors on the host, each device being waited for once."""
    found: dict[str, torch.Tensor] = {}
    for device in {vector.device for vector in vectors.values()}:
        there = {name: vector for name, vector in vectors.items() if vector.device == device}
        parts = torch.cat([*there.values()]).cpu().split([len(part) for part in there.values()])
        found |= zip(there, parts, strict=True)
    return found
