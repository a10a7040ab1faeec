"""Feed-forward layers.

Shapes: B batch, T tokens, D model width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from tiny_lm.model.activation import GELU


class FeedForward(nn.Module):
    """Two linear layers with a GELU in between, as in GPT-2."""

    def __init__(self, d_model: int, d_ff: int, *, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, d_ff, bias=bias)
        self.activation = GELU()
        self.fc2 = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [B, T, D] to [B, T, D]."""
        y: Tensor = self.fc2(self.activation(self.fc1(x)))
        return y


class SwiGLU(nn.Module):
    """``w2(silu(w1 x) * w3 x)`` (Shazeer 2020, arXiv:2002.05202), as in Llama: w1 gate, w2 down, w3 up."""

    def __init__(self, d_model: int, hidden_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.w1 = nn.Linear(d_model, hidden_dim, bias=bias)
        self.w2 = nn.Linear(hidden_dim, d_model, bias=bias)
        self.w3 = nn.Linear(d_model, hidden_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [B, T, D] to [B, T, D]."""
        y: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return y
