"""Position encodings: learned embeddings are added to the tokens, rotary ones rotate each head of q and k.

Shapes: B batch, T tokens, D model width, H heads, K head size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import Self

RotaryFactors = tuple[Tensor, Tensor]
"""cos and sin, [1, T, K] each, or [B, 1, T, K] if positions differ between rows; at least float32."""


class LearnedPositionalEmbedding(nn.Module):
    """Adds a learned vector for each position, as in GPT-2."""

    def __init__(self, max_len: int, d_model: int) -> None:
        super().__init__()
        self.pos_emb = nn.Embedding(max_len, d_model)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add to ``x`` [B, T, D] the embeddings of ``positions`` [T] or [B, T]."""
        embedded: Tensor = self.pos_emb(positions)
        return x + embedded


class RoPE(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split form of Hugging Face.

    Dimension i of a head is paired with dimension i + K/2 and the pair is rotated by ``position * theta ** (-2i / K)``:
    ``(a cos - b sin, b cos + a sin)``. The tables cover a whole head and its swapped halves.

    Args:
        dim: head size K.
        max_seq_len: number of positions.
        theta: base of the wavelengths.
    """

    cos: Tensor  # [max_seq_len, K], float32: cos, cos
    sin: Tensor  # -sin, sin

    def __init__(self, dim: int, max_seq_len: int, theta: float = 10_000.0) -> None:
        super().__init__()
        self.dim, self.max_seq_len, self.theta = dim, max_seq_len, theta
        cos, sin = self._tables(None, torch.float32)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _tables(self, device: torch.device | None, dtype: torch.dtype) -> RotaryFactors:
        dimensions = torch.arange(0, self.dim, 2, dtype=dtype, device=device)
        frequencies = 1.0 / self.theta ** (dimensions / self.dim)
        positions = torch.arange(self.max_seq_len, dtype=dtype, device=device)
        angles = torch.outer(positions, frequencies)  # [max_seq_len, K/2]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.to(torch.bfloat16)` would round the tables and `model.to_empty()` would lose them: recompute them in
        # float32, or in float64 if the whole model is.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.cos, self.sin = self._tables(self.cos.device, torch.promote_types(self.cos.dtype, torch.float32))
        return self

    def forward(self, positions: Tensor) -> RotaryFactors:
        """Return the factors for ``positions`` [T] or [B, T]; they are the same in all layers."""
        return self.cos[positions].unsqueeze(-3), self.sin[positions].unsqueeze(-3)


def apply_rotary_emb(x: Tensor, rotary: RotaryFactors) -> Tensor:
    """Rotate ``x`` [B, H, T, K] in the precision of the tables, at least float32; return it in its own dtype."""
    cos, sin = rotary
    exact = x.to(cos.dtype)
    first, second = exact.chunk(2, dim=-1)  # [B, H, T, K/2] each
    return torch.addcmul(exact * cos, torch.cat((second, first), dim=-1), sin).to(x.dtype)
