"""The small parts of a block: norms, feed-forwards, positions, dropout.

Shapes: B batch, T tokens, D width of the residual stream, F width of the feed-forward, H heads, K head size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with scale and shift (Ba et al. 2016, arXiv:1607.06450)."""


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation with a scale (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., D] over its last dimension, in the precision of the weight."""
        # Under autocast q and k arrive as bfloat16 beside float32 weights, for which there is no fused kernel.
        return F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.eps)


def dropout(p: float) -> nn.Module:
    """Return dropout with probability ``p``, or nothing at all when ``p`` is 0."""
    return nn.Dropout(p) if p else nn.Identity()


class FeedForward(nn.Module):
    """Two projections with a GELU (tanh form, arXiv:1606.08415) between them, as in GPT-2."""

    def __init__(self, d_model: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, hidden, bias=bias)
        self.activation = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [B, T, D] to [B, T, D]."""
        y: Tensor = self.fc2(self.activation(self.fc1(x)))
        return y


class SwiGLU(nn.Module):
    """``w2(silu(w1 x) * w3 x)`` (Shazeer 2020, arXiv:2002.05202), as in Llama: w1 gate, w3 up, w2 down."""

    def __init__(self, d_model: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.w1 = nn.Linear(d_model, hidden, bias=bias)
        self.w2 = nn.Linear(hidden, d_model, bias=bias)
        self.w3 = nn.Linear(d_model, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [B, T, D] to [B, T, D]."""
        y: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return y


# --- positions: learned ones are added to the tokens, rotary ones turn each head of q and k ---------------------------

Rotation = tuple[Tensor, Tensor]
"""Factors of a head and of its swapped halves, [1, T, K] each, or [B, 1, T, K] where rows differ; at least float32."""


class NoPositions(nn.Module):
    """Stands in the place of :class:`LearnedPositionalEmbedding` where positions are rotary."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return ``x``."""
        return x


class LearnedPositionalEmbedding(nn.Module):
    """Adds a learned vector for each position, as in GPT-2."""

    def __init__(self, context_length: int, d_model: int) -> None:
        super().__init__()
        self.pos_emb = nn.Embedding(context_length, d_model)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add to ``x`` [B, T, D] the embeddings of ``positions`` [T] or [B, T]."""
        embedded: Tensor = self.pos_emb(positions)
        return x + embedded


class NoRotation(nn.Module):
    """Stands in the place of :class:`RoPE` where positions are learned."""

    def forward(self, positions: Tensor) -> None:
        """Return nothing to turn by."""


class RoPE(nn.Module):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864), in the half-split form of Hugging Face.

    Dimension i of a head is paired with dimension i + K/2 and the pair is turned by ``position * theta ** (-2i / K)``:
    ``(a cos - b sin, b cos + a sin)``. The tables are laid out for a whole head and its swapped halves.
    """

    cos: Tensor  # [context, K], float32: cos, cos
    sin: Tensor  # -sin, sin

    def __init__(self, context_length: int, head_size: int, theta: float) -> None:
        super().__init__()
        self.context_length, self.head_size, self.theta = context_length, head_size, theta
        cos, sin = self._tables(None, torch.float32)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _tables(self, device: torch.device | None, dtype: torch.dtype) -> Rotation:
        dimensions = torch.arange(0, self.head_size, 2, dtype=dtype, device=device)
        frequencies = 1.0 / self.theta ** (dimensions / self.head_size)
        positions = torch.arange(self.context_length, dtype=dtype, device=device)
        angles = torch.outer(positions, frequencies)  # [context, K/2]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.to(torch.bfloat16)` would round the tables and `model.to_empty()` would lose them: compute them
        # again, in float32 or, where the whole model is in it, float64.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.cos, self.sin = self._tables(self.cos.device, torch.promote_types(self.cos.dtype, torch.float32))
        return self

    def forward(self, positions: Tensor) -> Rotation:
        """Return what heads at ``positions`` [T] or [B, T] are turned by: the same in all layers."""
        return self.cos[positions].unsqueeze(-3), self.sin[positions].unsqueeze(-3)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn ``x`` [B, H, T, K] in the precision of the tables, at least float32; return it in its own dtype."""
    cos, sin = rotation
    exact = x.to(cos.dtype)
    first, second = exact.chunk(2, dim=-1)  # [B, H, T, K/2] each
    return torch.addcmul(exact * cos, torch.cat((second, first), dim=-1), sin).to(x.dtype)


def keep(x: Tensor, rotation: None) -> Tensor:
    """Stand in the place of :func:`rotate` where positions are learned: return ``x``."""
    return x
