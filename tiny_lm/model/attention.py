"""Causal self-attention, and a readable reference of its kernel.

Shapes: B batch, T new tokens, S tokens seen (cached and new), D model width, H query heads, G key and value heads,
K head size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_lm.model.cache import KVCache
from tiny_lm.model.layers import Rotation

BLOCK = 128
"""Queries in a block of :func:`blocked_attention`."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Causal attention through the fused kernels of torch.

    Args:
        q: queries [B, H, T, K].
        k: keys [B, G, S, K]; H is a multiple of G.
        v: values [B, G, S, K].
        mask: [T, S] or [B, 1, T, S], true where a query may look. None: query i of several sees keys up to i, a single
            one sees all.
        dropout_p: probability with which an attention weight is dropped.

    Returns:
        [B, H, T, K].
    """
    causal = mask is None and q.shape[2] > 1
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal, enable_gqa=grouped
    )


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Do what :func:`attend` does, step by step (Vaswani et al. 2017, arXiv:1706.03762, equation 1).

    It holds all T x S weights in memory, which is what the fused kernels avoid.
    """
    queries, seen = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # [B, H, S, K]
    scores: Tensor = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # [B, H, T, S]
    if mask is None:
        mask = torch.ones(queries, seen, dtype=torch.bool, device=q.device).tril(seen - queries)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    return F.dropout(weights, dropout_p) @ v


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Do what :func:`attend` does in plain matrix products, for one block of queries after the other.

    A block leaves out the keys behind it, which none of its queries sees: up to half of the work. For short texts on a
    CPU this is faster than the fused kernels (:meth:`~tiny_lm.model.transformer.Transformer.use_blocked_attention`).
    """
    if mask is not None:
        return reference_attention(q, k, v, mask, dropout_p)
    held = k.shape[2] - q.shape[2]
    blocks = [
        reference_attention(q[:, :, end - BLOCK : end], k[:, :, : held + end], v[:, :, : held + end], None, dropout_p)
        for end in range(BLOCK, q.shape[2] + BLOCK, BLOCK)
    ]
    return torch.cat(blocks, dim=2)


class MultiHeadAttention(nn.Module):
    """Causal self-attention with any number of key and value heads (MHA, GQA: arXiv:2305.13245, MQA).

    Args:
        layer: index of the block, by which a cache knows it.
        d_model: width D of the residual stream.
        n_heads: number H of query heads.
        n_kv_heads: number G of key and value heads.
        head_size: width K of a head.
        qkv_bias: biases on the projections to q, k and v.
        out_bias: a bias on the output projection.
        dropout: probability with which an attention weight is dropped in training.
        turn: turns q and k by position (:func:`~tiny_lm.model.layers.rotate`), or leaves them.
        q_norm: a norm over each head of q, or ``nn.Identity()``.
        k_norm: a norm over each head of k, or ``nn.Identity()``.
    """

    def __init__(
        self,
        layer: int,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        head_size: int,
        *,
        qkv_bias: bool,
        out_bias: bool,
        dropout: float,
        turn: Callable[[Tensor, Any], Tensor],
        q_norm: nn.Module,
        k_norm: nn.Module,
    ) -> None:
        super().__init__()
        self.layer, self.head_size, self.dropout = layer, head_size, dropout
        self.W_q = nn.Linear(d_model, n_heads * head_size, bias=qkv_bias)
        self.W_k = nn.Linear(d_model, n_kv_heads * head_size, bias=qkv_bias)
        self.W_v = nn.Linear(d_model, n_kv_heads * head_size, bias=qkv_bias)
        self.out_proj = nn.Linear(n_heads * head_size, d_model, bias=out_bias)
        self.turn, self.q_norm, self.k_norm = turn, q_norm, k_norm
        self.attend = attend

    def forward(
        self, x: Tensor, rotation: Rotation | None, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Let each token of ``x`` [B, T, D] look at itself and those before it.

        Args:
            x: normalised residual stream [B, T, D].
            rotation: what q and k are turned by; None where positions are learned.
            mask: as for :func:`attend`.
            cache: keys and values of earlier tokens; those of ``x`` are added to it.

        Returns:
            [B, T, D].
        """
        q, k, v = self.project(x)
        q, k = self.turn(self.q_norm(q), rotation), self.turn(self.k_norm(k), rotation)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = self.attend(q, k, v, mask, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).flatten(2)  # [B, H, T, K] -> [B, T, H*K]
        projected: Tensor = self.out_proj(y)
        return projected

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, H, T, K], keys and values [B, G, T, K] of ``x`` [B, T, D]."""
        return self.heads(self.W_q(x)), self.heads(self.W_k(x)), self.heads(self.W_v(x))

    def heads(self, x: Tensor) -> Tensor:
        """Split [B, T, heads*K] into [B, heads, T, K]."""
        batch, length, _ = x.shape
        return x.view(batch, length, -1, self.head_size).transpose(1, 2)
