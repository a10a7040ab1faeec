"""Causal self-attention, and a readable reference implementation of its kernel.

Shapes: B batch, T new tokens, S all tokens (cached and new), D model width, H query heads, G key-value heads,
K head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_lm.model.cache import KVCache
from tiny_lm.model.normalization import RMSNorm
from tiny_lm.model.position import RotaryFactors, apply_rotary_emb

BLOCK = 128
"""Queries per block of :func:`blocked_attention`."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Compute causal attention with PyTorch's fused kernels.

    Args:
        q: queries [B, H, T, K].
        k: keys [B, G, S, K]; H is a multiple of G.
        v: values [B, G, S, K].
        mask: [T, S] or [B, 1, T, S], true where a query may attend. None: causal for several queries; a single one
            attends to all keys.
        dropout_p: dropout probability of the attention weights.

    Returns:
        [B, H, T, K].
    """
    causal = mask is None and q.shape[2] > 1
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal, enable_gqa=grouped
    )


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Compute the same as :func:`attend`, step by step (Vaswani et al. 2017, arXiv:1706.03762, equation 1).

    Unlike the fused kernels it materializes all T x S weights.
    """
    queries, keys = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # [B, H, S, K]
    scores: Tensor = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # [B, H, T, S]
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    return F.dropout(weights, dropout_p) @ v


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Compute the same as :func:`attend` in plain matrix products, one block of queries at a time.

    A block skips the keys after it, which causality masks anyway: up to half of the work. For short sequences on a CPU
    this is faster than the fused kernels (:meth:`~tiny_lm.model.transformer.Transformer.use_blocked_attention`).
    """
    if mask is not None:
        return reference_attention(q, k, v, mask, dropout_p)
    old = k.shape[2] - q.shape[2]
    blocks = [
        reference_attention(q[:, :, end - BLOCK : end], k[:, :, : old + end], v[:, :, : old + end], None, dropout_p)
        for end in range(BLOCK, q.shape[2] + BLOCK, BLOCK)
    ]
    return torch.cat(blocks, dim=2)


class MultiHeadAttention(nn.Module):
    """Causal self-attention with any number of key-value heads (MHA, GQA: arXiv:2305.13245, MQA).

    Args:
        layer: index of the block, which is its index in the cache.
        d_model: model width D.
        n_heads: number of query heads H.
        n_kv_heads: number of key-value heads G.
        head_size: head size K.
        qkv_bias: biases on the query, key and value projections.
        out_bias: bias on the output projection.
        dropout: dropout probability of the attention weights in training.
        qk_norm_eps: epsilon of an RMSNorm over each head of q and k; None: no such norms.
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
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.head_size, self.dropout = layer, head_size, dropout
        self.W_q = nn.Linear(d_model, n_heads * head_size, bias=qkv_bias)
        self.W_k = nn.Linear(d_model, n_kv_heads * head_size, bias=qkv_bias)
        self.W_v = nn.Linear(d_model, n_kv_heads * head_size, bias=qkv_bias)
        self.out_proj = nn.Linear(n_heads * head_size, d_model, bias=out_bias)
        self.qk_norm = qk_norm_eps is not None
        if self.qk_norm:
            self.q_norm = RMSNorm(head_size, eps=qk_norm_eps)
            self.k_norm = RMSNorm(head_size, eps=qk_norm_eps)
        self.attend = attend

    def forward(
        self, x: Tensor, rotary: RotaryFactors | None, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Let each token of ``x`` [B, T, D] attend to itself and earlier ones.

        Args:
            x: normalized residual stream [B, T, D].
            rotary: rotation of q and k; None with learned positions.
            mask: as for :func:`attend`.
            cache: keys and values of earlier tokens; those of ``x`` are appended.

        Returns:
            [B, T, D].
        """
        q, k, v = self.project(x)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = apply_rotary_emb(q, rotary), apply_rotary_emb(k, rotary)
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
