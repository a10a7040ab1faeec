"""Attention maps: the attention weights of all heads, recorded during a forward pass."""

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tiny_lm.model import Transformer, reference_attention
from tiny_lm.model.transformer import Block

_MAX_TOKENS = 48
_MAX_BYTES = 400_000
"""Size of all maps together: with more heads, fewer tokens are shown."""

_MIN_SHARE = 0.4
"""Minimum mean share of a head's attention on one target for the head to be described by it."""


@dataclass(frozen=True)
class HeadMap:
    """The attention weights of one head."""

    layer: int
    head: int
    habit: str
    """Where it attends most."""
    spread: float
    """Effective number of tokens that its weights cover."""
    data: str
    """Base64 of the lower triangle in row-major order, one byte per weight: ``255 * sqrt(weight)``."""


@dataclass(frozen=True)
class AttentionMaps:
    """All heads of a model on one text."""

    ids: list[int]
    layers: int
    heads: int
    maps: list[HeadMap]

    @property
    def clearest(self) -> int:
        """Index of the head with the least spread that is not fixed on the first token: the one to show first."""
        return min(
            range(len(self.maps)), key=lambda i: (self.maps[i].habit.startswith("first token"), self.maps[i].spread)
        )


@contextmanager
def record_attention(model: Transformer) -> Iterator[list[Tensor]]:
    """Record the attention weights [B, H, T, S] of each layer in call order while the block runs.

    Each layer then uses the reference implementation, which computes the same: once with the values, and once with the
    identity matrix in their place, which yields the weights.
    """
    recorded: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
        identity = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)  # [B, G, S, S]
        recorded.append(reference_attention(q, k, identity, mask))
        return reference_attention(q, k, v, mask, dropout_p)

    blocks = [block for block in model.blocks if isinstance(block, Block)]
    original = [block.attn.attend for block in blocks]
    try:
        for block in blocks:
            block.attn.attend = attend
        yield recorded
    finally:
        for block, attend_ in zip(blocks, original, strict=True):
            block.attn.attend = attend_


@torch.inference_mode()
def map_attention(model: Transformer, ids: Sequence[int]) -> AttentionMaps:
    """Return the attention maps of all heads of ``model`` on the beginning of a text.

    Args:
        model: in evaluation mode.
        ids: the text; truncated so that the maps of all heads fit into the page.
    """
    heads = model.config.n_layers * model.config.n_heads
    length = min(len(ids), _MAX_TOKENS, model.config.context_length)
    while length > 8 and heads * length * (length + 1) // 2 > _MAX_BYTES:
        length -= 1
    shown = list(ids[:length])
    with record_attention(model) as recorded:
        model(torch.tensor([shown]))
    rows, columns = torch.tril_indices(length, length)
    maps = [
        HeadMap(layer, head, describe_habit(weights), measure_spread(weights), _pack(weights[rows, columns]))
        for layer, of_layer in enumerate(recorded, start=1)
        for head, weights in enumerate(of_layer[0].float(), start=1)
    ]
    return AttentionMaps(shown, model.config.n_layers, model.config.n_heads, maps)


def _pack(weights: Tensor) -> str:
    return base64.b64encode(bytes((255 * weights.sqrt()).round().to(torch.uint8).tolist())).decode("ascii")


def describe_habit(weights: Tensor) -> str:
    """Describe where a head attends most, from its weights [T, T] over all tokens but the first two."""
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
    return f"{name} {share:.0%}" if share >= _MIN_SHARE else f"about {measure_spread(weights):.0f} tokens"


def measure_spread(weights: Tensor) -> float:
    """Return the effective number of attended tokens: the mean of ``exp`` of the entropy of the weights [T, T]."""
    return float(torch.special.entr(weights).sum(dim=-1).exp().mean())
