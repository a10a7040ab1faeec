"""What the heads of a model look at: its attention weights, recorded while it reads a text."""

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tiny_lm.model import Transformer, reference_attention
from tiny_lm.model.transformer import Block

_MOST_TOKENS = 48
_MOST_BYTES = 400_000
"""Of all maps of a model together; more heads see less of the text."""

_CLEAR = 0.4
"""Mean share of a head's attention that names the head."""


@dataclass(frozen=True)
class HeadMap:
    """The attention weights of one head."""

    layer: int
    head: int
    habit: str
    """Where it looks most, measured."""
    spread: float
    """Over how many tokens its weights spread."""
    data: str
    """Base64 of the lower triangle, row by row, a byte for each weight: ``255 * sqrt(weight)``."""


@dataclass(frozen=True)
class AttentionMaps:
    """All heads of a model on one text."""

    ids: list[int]
    layers: int
    heads: int
    maps: list[HeadMap]

    @property
    def clearest(self) -> int:
        """Index of the head that looks at the fewest tokens, but not always at the first: worth a first look."""
        return min(
            range(len(self.maps)), key=lambda i: (self.maps[i].habit.startswith("first token"), self.maps[i].spread)
        )


@contextmanager
def recording(model: Transformer) -> Iterator[list[Tensor]]:
    """While the block runs, keep the attention weights [B, H, T, S] of each layer that reads, in its order.

    Each layer attends through the readable reference meanwhile, which computes the same: once with the values and once
    with the unit matrix in their place, which yields the weights themselves.
    """
    kept: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
        units = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)  # [B, G, S, S]
        kept.append(reference_attention(q, k, units, mask))
        return reference_attention(q, k, v, mask, dropout_p)

    blocks = [block for block in model.blocks if isinstance(block, Block)]
    before = [block.attn.attend for block in blocks]
    try:
        for block in blocks:
            block.attn.attend = attend
        yield kept
    finally:
        for block, own in zip(blocks, before, strict=True):
            block.attn.attend = own


@torch.inference_mode()
def map_attention(model: Transformer, ids: Sequence[int]) -> AttentionMaps:
    """Return what each head of ``model`` looks at in the beginning of a text.

    Args:
        model: in evaluation mode.
        ids: the text; so much of it is taken as the maps of all heads have room for.
    """
    heads = model.config.n_layers * model.config.n_heads
    length = min(len(ids), _MOST_TOKENS, model.config.context_length)
    while length > 8 and heads * length * (length + 1) // 2 > _MOST_BYTES:
        length -= 1
    shown = list(ids[:length])
    with recording(model) as kept:
        model(torch.tensor([shown]))
    rows, columns = torch.tril_indices(length, length)
    maps = [
        HeadMap(layer, head, describe_habit(weights), measure_spread(weights), _pack(weights[rows, columns]))
        for layer, of_layer in enumerate(kept, start=1)
        for head, weights in enumerate(of_layer[0].float(), start=1)
    ]
    return AttentionMaps(shown, model.config.n_layers, model.config.n_heads, maps)


def _pack(weights: Tensor) -> str:
    return base64.b64encode(bytes((255 * weights.sqrt()).round().to(torch.uint8).tolist())).decode("ascii")


def describe_habit(weights: Tensor) -> str:
    """Say where a head looks most, from its weights [T, T], over all tokens but the first two."""
    length = len(weights)
    if length < 3:
        return ""
    rows = torch.arange(2, length)
    shares = {
        "itself": weights[rows, rows],
        "previous token": weights[rows, rows - 1],
        "first token": weights[rows, 0],
    }
    name, share = max(((name, float(values.mean())) for name, values in shares.items()), key=lambda item: item[1])
    return f"{name} {share:.0%}" if share >= _CLEAR else f"about {measure_spread(weights):.0f} tokens"


def measure_spread(weights: Tensor) -> float:
    """Return over how many tokens a head's weights [T, T] spread: the mean of ``exp`` of their entropy."""
    return float(torch.special.entr(weights).sum(dim=-1).exp().mean())
