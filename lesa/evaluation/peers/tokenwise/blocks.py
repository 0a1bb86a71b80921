"""FLUX's two kinds of blocks on some of their tokens, the others from a cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lesa.evaluation.peers.tokenwise.memory import Cell, take

Rotary = tuple[Tensor, Tensor]  # cosines and sines, [N, D] each


class _Stream(NamedTuple):
    """The layers that one stream of tokens passes in a block with two streams."""

    name: str
    norm1: nn.Module
    project: tuple[nn.Module, ...]  # query, key, value, norms of query and key
    out: nn.Module
    norm2: nn.Module
    mlp: nn.Module


def run_double(
    block: Any, cell: Cell, text: Tensor, image: Tensor, temb: Tensor, rotary: Rotary
) -> tuple[Tensor, Tensor]:
    """A block with two streams, text [B, M, C] and image [B, L, C]: joint attention, then an MLP of
    each stream, on the tokens that `cell` picks."""
    streams, tokens, border = _streams(block), (text, image), text.shape[1]
    picks = [cell.pick(stream.name, x) for stream, x in zip(streams, tokens, strict=True)]
    projected, gates = [], []
    for stream, x, index, offset in zip(streams, tokens, picks, (0, border), strict=True):
        normed, *modulation = stream.norm1(take(x, index), emb=temb)
        gates.append([part[:, None] for part in modulation])
        where = _positions(x, index) + offset
        projected.append(_project(stream.project, block.attn.head_dim, normed, rotary, where))
    query, key, value = (torch.cat(part, dim=1) for part in zip(*projected, strict=True))
    attended = _attend(cell, query, key, value, _joined(picks, border), border)
    counts = [part[0].shape[1] for part in projected]
    outputs = []
    for stream, x, index, mod, part in zip(
        streams, tokens, picks, gates, attended.split(counts, dim=1), strict=True
    ):
        gate, shift, scale, gate_mlp = mod
        x = x + gate * cell.settle(f"{stream.name} attention", stream.name, stream.out(part), index)
        normed = stream.norm2(take(x, index)) * (1 + scale) + shift
        x = x + gate_mlp * cell.settle(f"{stream.name} mlp", stream.name, stream.mlp(normed), index)
        outputs.append(x)
    return outputs[0], outputs[1]


def run_single(
    block: Any, cell: Cell, text: Tensor, image: Tensor, temb: Tensor, rotary: Rotary
) -> tuple[Tensor, Tensor]:
    """A block with one stream, [text, image]: attention beside an MLP, one projection of both."""
    x, border = torch.cat([text, image], dim=1), text.shape[1]
    index = cell.pick("joint", x)
    normed, gate = block.norm(take(x, index), emb=temb)
    layers, where = _projections(block.attn), _positions(x, index)
    query, key, value = _project(layers, block.attn.head_dim, normed, rotary, where)
    attended = _attend(cell, query, key, value, index, border)
    hidden = block.act_mlp(block.proj_mlp(normed))
    fresh = block.proj_out(torch.cat([attended, hidden], dim=2))
    x = x + gate[:, None] * cell.settle("block", "joint", fresh, index)
    return x[:, :border], x[:, border:]


def _positions(tokens: Tensor, index: Tensor | None) -> Tensor:
    """Where the computed tokens stand, [B or 1, n]."""
    return torch.arange(tokens.shape[1], device=tokens.device)[None] if index is None else index


def _projections(attn: Any) -> tuple[nn.Module, ...]:
    return attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k


def _streams(block: Any) -> tuple[_Stream, _Stream]:
    attn = block.attn
    added = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
    norms = attn.norm_added_q, attn.norm_added_k
    text = (block.norm1_context, (*added, *norms), attn.to_add_out)
    image = (block.norm1, _projections(attn), attn.to_out[0])
    return (
        _Stream("text", *text, block.norm2_context, block.ff_context),
        _Stream("image", *image, block.norm2, block.ff),
    )


def _joined(picks: list[Tensor | None], text_length: int) -> Tensor | None:
    """Indices into [text, image] from those into text and into image."""
    text, image = picks
    return None if text is None or image is None else torch.cat([text, image + text_length], 1)


def _project(
    layers: tuple[nn.Module, ...], head_dim: int, x: Tensor, rotary: Rotary, where: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [B, n, H, D] of tokens at the positions `where` [B or 1, n]."""
    query, key, value = (layer(x).unflatten(-1, (-1, head_dim)) for layer in layers[:3])
    query, key = layers[3](query), layers[4](key)
    return _rotate(query, rotary, where), _rotate(key, rotary, where), value


def _rotate(x: Tensor, rotary: Rotary, where: Tensor) -> Tensor:
    """Rotary position embedding of pairs of channels, in fp32 as in diffusers."""
    cos, sin = (table[where][:, :, None] for table in rotary)  # [B or 1, n, 1, D]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def _attend(
    cell: Cell, query: Tensor, key: Tensor, value: Tensor, index: Tensor | None, border: int
) -> Tensor:
    """Attention output [B, n, H D] of the computed tokens, of which text ends at `border`.

    Keys and values of the others are those of the last time that they were computed.
    """
    key, value = cell.refresh("key", key, index), cell.refresh("value", value, index)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # [B, H, n, D]
    if cell.full and cell.rule.needs_map:
        weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        received = weights.mean(1).sum(1)
        text, image = received[:, :border], received[:, border:]
        cell.received = {"joint": received, "text": text, "image": image}
        attended = weights @ value
    else:
        attended = scaled_dot_product_attention(query, key, value)
    return attended.transpose(1, 2).flatten(2)
