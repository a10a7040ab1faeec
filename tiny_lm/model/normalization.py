"""Normalization layers.

Shapes: D model width, or the size of a head.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Layer normalization with scale and shift (Ba et al. 2016, arXiv:1607.06450)."""


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalization with a scale (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` [..., D] over its last dimension, in the precision of the weight."""
        # Under autocast q and k are bfloat16 and the weights float32, which no fused kernel supports.
        return F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.eps)
